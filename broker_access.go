package main

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"os/signal"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	zmq "github.com/pebbe/zmq4"
)

// An accessList says who may do what at the TCP endpoints of a broker. It is what the file of
// --authorized says: a line for each key, as in accessForm, with words between blanks. # begins a
// comment if it begins a word.
//
// KEY is a public key, or * for everybody who has no line. NAME is what logs and commands call the
// holder. SERVICE is a glob, as in path.Match; manage allows mmi.services and mmi.metrics; all allows
// everything.
type accessList struct {
	grants  map[string]*grant // by the text of the key
	anybody *grant            // nil if unknown keys are not admitted
}

const accessForm = "KEY NAME [call=SERVICE,...] [serve=SERVICE,...] [manage | all]"

// A grant is what the holder of a key may do. A nil grant allows nothing.
type grant struct {
	name        string
	call, serve []string // globs
	manage      bool
}

// ipcGrant is that of peers on ipc endpoints, for whom the permissions of the socket decide, and of
// everybody where no keys are in use. It has no name.
var ipcGrant = &grant{call: []string{"*"}, serve: []string{"*"}, manage: true}

func (g *grant) mayCall(service string) bool {
	switch {
	case g == nil:
		return false
	case service == mmiService, service == mmiCancel, service == mmiCredit, service == mmiServices:
		return len(g.call) > 0 || g.manage
	case isManagement(service):
		return g.manage
	}
	return matchesAny(g.call, service)
}

func (g *grant) mayServe(service string) bool { return g != nil && matchesAny(g.serve, service) }

// holder returns what a message calls the holder.
func (g *grant) holder() string {
	if g == nil {
		return "this key"
	}
	return g.name
}

func matchesAny(globs []string, name string) bool {
	return slices.ContainsFunc(globs, func(glob string) bool {
		if glob == "*" {
			return true
		}
		ok, err := path.Match(glob, name)
		return ok && err == nil
	})
}

// of returns the grant of a key, nil if it is not known.
func (a *accessList) of(key string) *grant {
	if g, ok := a.grants[key]; ok {
		return g
	}
	return a.anybody
}

// grantOf returns the grant of the user of a message, nil if there is none.
func (b *Broker) grantOf(user string) *grant {
	switch {
	case b.access == nil, user == ipcUser:
		return ipcGrant
	case user == "":
		return nil // The guard names everybody.
	}
	return b.access.of(user)
}

// mayGoOn tells whether the client of a request that was taken may still have it served.
func (b *Broker) mayGoOn(r *brokerRequest) bool {
	return !r.client.replaced && b.grantOf(r.client.user).mayCall(string(r.name))
}

// forbid answers a request whose client may not call the service, or, if the request has ended, may not
// any more.
func (b *Broker) forbid(r *brokerRequest, ended bool) {
	mine := b.grantOf(r.client.user)
	b.unauthorized(r.client.user, mine, "call", string(r.name))
	why := mine.holder() + " may not call it"
	if ended {
		why += " any more, so its reply is withheld"
	}
	b.answer(r, exitNotAllowed, why)
}

// unauthorized counts and logs what a key does not allow, once a minute for each key.
func (b *Broker) unauthorized(user string, g *grant, verb, service string) {
	b.count(nil, unauthorizedTotal, 1)
	b.log.warn("unauthorized "+user, "not allowed", "key", user, "name", g.holder(), verb, logged(service))
}

// revoke gives up a worker whose key may not serve any more, or whose identity now belongs to another
// user.
func (b *Broker) revoke(w *brokerWorker) {
	b.count(nil, unauthorizedTotal, 1)
	b.disconnect(w, "its key may not serve "+w.service.name)
	b.dispatch(w.service)
}

// SetAccess replaces what the holders of keys may do. What is no longer allowed stops at once.
func (b *Broker) SetAccess(access *accessList) {
	b.access = access
	// First those that are idle, or one of them might be given the request of another.
	for _, busy := range []bool{false, true} {
		for _, w := range b.workers {
			if (w.request != nil) == busy && !b.grantOf(w.user).mayServe(w.service.name) {
				b.revoke(w)
			}
		}
	}
	for _, w := range b.workers {
		if r := w.request; r != nil && r.node != nil && !b.mayGoOn(r) { // It can be recalled.
			b.giveUp(r, cancelledTotal, "its client may not call the service any more")
			b.forbid(r, true)
		}
	}
	b.forbidding = true
	b.forbidWaiting(maxEnded)
	clear(b.reports)
}

// forbidWaiting ends up to max waiting requests that their clients may not make any more.
func (b *Broker) forbidWaiting(max int) {
	forbidden := 0
	for _, c := range b.clients {
		mine := b.grantOf(c.user)
		for _, r := range c.recallable.all(nil) {
			if r.inQueue == nil || mine.mayCall(string(r.name)) {
				continue
			}
			if forbidden++; forbidden > max {
				return
			}
			b.dequeue(r, false)
			b.end(r)
			b.forbid(r, false)
			b.dispatch(r.service)
		}
	}
	b.forbidding = false
	for _, s := range b.services {
		b.dispatch(s)
	}
}

// readAccess reads the file of --authorized.
func readAccess(file string) (*accessList, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, misuse("give a file with lines like "+accessForm, "--authorized: %w", err)
	}
	list, err := parseAccess(string(text), file)
	if err != nil {
		return nil, misuse("a line is "+accessForm, "--authorized: %w", err)
	}
	return list, nil
}

// parseAccess parses the text of a file. An error begins with the file and the line.
func parseAccess(text, file string) (*accessList, error) {
	list := &accessList{grants: map[string]*grant{}}
	number := 0
	for line := range strings.Lines(text) {
		number++
		words := strings.Fields(line)
		// Within a word it may be a digit of a key in Z85.
		if i := slices.IndexFunc(words, func(word string) bool { return word[0] == '#' }); i >= 0 {
			words = words[:i]
		}
		if len(words) == 0 {
			continue
		}
		g, err := parseGrant(words)
		if err == nil {
			err = list.add(words[0], g)
		}
		if err != nil {
			return nil, fmt.Errorf("%s:%d: %w", file, number, err)
		}
	}
	return list, nil
}

// add adds the grant of a key, or of *.
func (a *accessList) add(key string, g *grant) error {
	if key == "*" {
		if a.anybody != nil {
			return errors.New("* has a line already")
		}
		a.anybody = g
		return nil
	}
	public, err := parsePublicKey(key)
	if err != nil {
		return err
	}
	if a.grants[public.String()] != nil {
		return fmt.Errorf("%v has a line already", public)
	}
	a.grants[public.String()] = g
	return nil
}

// parseGrant parses the words behind the key.
func parseGrant(words []string) (*grant, error) {
	if slices.ContainsFunc(words, func(word string) bool { return strings.Contains(word, secretPrefix) }) {
		return nil, errSecretKey
	}
	if len(words) < 3 || strings.Contains(words[1], "=") {
		return nil, errors.New("a line has a key, a name and what the holder may do: call=, serve=, manage or all")
	}
	g := &grant{name: words[1]}
	if strings.Trim(g.name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") != "" {
		return nil, fmt.Errorf("the name %q has a character other than A-Z a-z 0-9 . _ -", g.name)
	}
	for _, word := range words[2:] {
		verb, globs, hasGlobs := strings.Cut(word, "=")
		switch {
		case verb == "call" && hasGlobs:
			g.call = append(g.call, strings.Split(globs, ",")...)
		case verb == "serve" && hasGlobs:
			g.serve = append(g.serve, strings.Split(globs, ",")...)
		case word == "manage":
			g.manage = true
		case word == "all":
			g.call, g.serve, g.manage = ipcGrant.call, ipcGrant.serve, true
		default:
			return nil, fmt.Errorf("%q is none of call=, serve=, manage and all", word)
		}
	}
	for _, glob := range slices.Concat(g.call, g.serve) {
		if glob == "" {
			return nil, errors.New("call= and serve= have names of services with commas between them, and no blanks")
		}
		if _, err := path.Match(glob, ""); err != nil || strings.Contains(glob, "[!") {
			return nil, fmt.Errorf("%q is not a name of a service or a pattern such as build-*", glob)
		}
	}
	return g, nil
}

// The names by which ZeroMQ asks for the endpoints of each kind. They must not be empty.
const (
	tcpDomain = "tcp"
	ipcDomain = "ipc"
)

// ipcUser is the user of all peers on ipc endpoints.
const ipcUser = "ipc"

// A guard decides who may connect to a broker with keys. It answers ZeroMQ's questions (ZAP, RFC 27): it
// admits each key that has a grant, and everybody on ipc endpoints, and names the user. What the user may
// do is decided for each message. It belongs to the goroutine of the broker, but for the list.
type guard struct {
	key     *secretKey
	file    string
	log     *slog.Logger
	list    atomic.Pointer[accessList]
	wake    atomic.Pointer[func()] // tells the broker of a new list
	handler *socket

	unknown map[string]time.Time // keys that were refused, and when this was logged
}

const maxUnknownKeys = 100 // that are logged, each once a minute

// newGuard returns a guard whose handler is bound. Call it before another socket is bound: until it
// answers, nobody gets in.
func newGuard(key *secretKey, file string, log *slog.Logger) (*guard, error) {
	if !zmq.HasCurve() {
		return nil, errNoCurve
	}
	list, err := readAccess(file)
	if err != nil {
		return nil, err
	}
	handler, err := newSocket(zmq.REP)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(handler.SetLinger(0), handler.Bind("inproc://zeromq.zap.01")); err != nil {
		handler.Close()
		return nil, fmt.Errorf("bind the ZAP handler: %w", err)
	}
	g := &guard{key: key, file: file, log: log, handler: handler, unknown: map[string]time.Time{}}
	g.list.Store(list)
	return g, nil
}

// access returns the current list, nil without a guard.
func (g *guard) access() *accessList {
	if g == nil {
		return nil
	}
	return g.list.Load()
}

func (g *guard) setWake(wake func()) {
	if g != nil {
		g.wake.Store(&wake)
	}
}

// onHangup reads the file again after each SIGHUP, until it is stopped. A file that is bad changes
// nothing.
func (g *guard) onHangup() (stop func()) {
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	go func() {
		for range hangups {
			list, err := readAccess(g.file)
			if err != nil {
				g.log.Error("the old rules stay", "why", err)
				continue
			}
			g.list.Store(list)
			if wake := g.wake.Load(); wake != nil {
				(*wake)()
			}
		}
	}()
	return func() {
		signal.Stop(hangups)
		close(hangups)
	}
}

// answer returns the answer to a question, after the broker has accepted so many connections: version,
// number, status, text, user and metadata.
func (g *guard) answer(question [][]byte, accepted uint64) [][]byte {
	status, text, id := "400", "the key is not authorized", ""
	if user := g.admit(question); user != "" {
		status, text, id = "200", "", userID(user, accepted)
	}
	var number []byte
	if len(question) > 1 {
		number = question[1]
	}
	return [][]byte{[]byte("1.0"), number, []byte(status), []byte(text), []byte(id), nil}
}

// admit returns the user that a question is about, or nothing for nobody who may come in. A question has
// the frames version, number, domain, address, identity, mechanism and, for CURVE, the key.
func (g *guard) admit(question [][]byte) (user string) {
	if len(question) < 6 || string(question[0]) != "1.0" {
		return ""
	}
	domain, mechanism, credentials := string(question[2]), string(question[5]), question[6:]
	switch {
	case domain == ipcDomain && mechanism == "NULL":
		return ipcUser
	case domain == tcpDomain && mechanism == "CURVE" && len(credentials) == 1 && len(credentials[0]) == keyLength:
		key := publicKey(credentials[0]).String()
		if g.access().of(key) != nil {
			return key
		}
		g.logUnknown(key, time.Now())
	}
	return ""
}

// userID is the text by which ZeroMQ knows the user of a connection, and parseUserID is its inverse.
func userID(user string, accepted uint64) string { return fmt.Sprintf("%s %d", user, accepted) }

func parseUserID(text string) (user string, admitted uint64) {
	user, number, _ := strings.Cut(text, " ")
	admitted, err := strconv.ParseUint(number, 10, 64)
	if err != nil {
		return "", 0
	}
	return user, admitted
}

// logUnknown logs a key that was refused, so that somebody can authorize it: once a minute, and not more
// than maxUnknownKeys.
func (g *guard) logUnknown(key string, now time.Time) {
	maps.DeleteFunc(g.unknown, func(_ string, logged time.Time) bool { return now.Sub(logged) >= time.Minute })
	if _, ok := g.unknown[key]; !ok && len(g.unknown) < maxUnknownKeys {
		g.unknown[key] = now
		g.log.Warn("unknown key", "key", key)
	}
}
