package main

import (
	"crypto/sha256"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// keyOf returns a public key that belongs to a name, as nobody's secret key does.
func keyOf(name string) publicKey { return sha256.Sum256([]byte(name)) }

// userOf returns the user of a message that came with the key of a name.
func userOf(name string) string { return keyOf(name).String() }

// accessFor parses rules that have names in place of keys: "alice call=*".
func accessFor(t testing.TB, rules ...string) *accessList {
	t.Helper()
	var text strings.Builder
	for _, rule := range rules {
		name, _, _ := strings.Cut(rule, " ")
		fmt.Fprintf(&text, "%v %s\n", keyOf(name), rule)
	}
	list, err := parseAccess(text.String(), "authorized")
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// newGuardedRouter returns a router whose broker takes keys. The rules are those of accessFor.
func newGuardedRouter(t *testing.T, rules ...string) *fakeRouter {
	t.Helper()
	r := newFakeRouter(t)
	r.SetAccess(accessFor(t, rules...))
	return r
}

// by lets the broker receive a message of a user: a name, ipcUser, or nothing.
func (r *fakeRouter) by(name string, spelled ...string) { r.t.Helper(); r.over(-1, name, spelled...) }

// over does the same for a message that came over a connection.
func (r *fakeRouter) over(source int, name string, spelled ...string) {
	r.t.Helper()
	user := name
	if name != "" && name != ipcUser {
		user = userOf(name)
	}
	if _, open := r.connections[source]; !open {
		r.Accepted(source)
	}
	r.Receive(frames(spelled...), sender{source, user, r.accepted}, r.clock)
}

// expectNothingHeld checks that the broker holds no request, and that no service exists besides those
// that are named.
func (r *fakeRouter) expectNothingHeld(services ...string) {
	r.t.Helper()
	if r.unfinished != 0 || r.held != 0 {
		r.t.Errorf("the broker holds %d requests of %d bytes", r.unfinished, r.held)
	}
	var names []string
	for name := range r.services {
		names = append(names, name)
	}
	slices.Sort(names)
	if !slices.Equal(names, services) {
		r.t.Errorf("there are the services %q, want %q", names, services)
	}
}

// notAllowedTo returns the reply to a request that its client may not make.
func notAllowedTo(identity, service, name string) []string {
	return []string{identity, "", "MDPC01", service, "", fmt.Sprintf("bbroker: %s: %s may not call it\n", service, name), "exit status 077"}
}

// withheldFrom returns what comes in place of a reply to a client that may not call the service any more.
func withheldFrom(identity, service, name string) []string {
	return []string{identity, "", "MDPC01", service, "",
		fmt.Sprintf("bbroker: %s: %s may not call it any more, so its reply is withheld\n", service, name), "exit status 077"}
}

// lostReply returns the reply to a request whose worker was lost.
func lostReply(identity, service string) []string {
	return []string{identity, "", "MDPC01", service, "", "bbroker: " + service + ": the worker was lost while it had the request; the command may have run\n", "exit status 069"}
}

func TestFileOfKeysSaysWhoMayDoWhat(t *testing.T) {
	alice, bob := keyOf("alice"), keyOf("bob")
	for _, test := range []struct {
		name, text string
		want       map[string]*grant // by the text of the key
		anybody    *grant
	}{
		{"nothing", "", nil, nil},
		{"comments and empty lines", "# Alice\n\n   \t\n  # " + alice.String() + " alice all\n#\n", nil, nil},
		{"a line without its end", alice.String() + " alice call=a", map[string]*grant{alice.String(): {name: "alice", call: []string{"a"}}}, nil},
		{"CRLF", "# keys\r\n\r\n" + alice.String() + " alice call=a\r\n" + bob.String() + " bob manage\r\n",
			map[string]*grant{alice.String(): {name: "alice", call: []string{"a"}}, bob.String(): {name: "bob", manage: true}}, nil},
		{"blanks and a comment behind", "\t" + alice.String() + "  alice\tcall=a   serve=b # until May\n",
			map[string]*grant{alice.String(): {name: "alice", call: []string{"a"}, serve: []string{"b"}}}, nil},
		{"several globs and words", alice.String() + " alice call=a,b-* call=c serve=d,e manage",
			map[string]*grant{alice.String(): {name: "alice", call: []string{"a", "b-*", "c"}, serve: []string{"d", "e"}, manage: true}}, nil},
		{"all", alice.String() + " alice all",
			map[string]*grant{alice.String(): {name: "alice", call: []string{"*"}, serve: []string{"*"}, manage: true}}, nil},
		{"all does not spread", alice.String() + " alice all call=a serve=b\n" + bob.String() + " bob all",
			map[string]*grant{alice.String(): {name: "alice", call: []string{"*", "a"}, serve: []string{"*", "b"}, manage: true},
				bob.String(): {name: "bob", call: []string{"*"}, serve: []string{"*"}, manage: true}}, nil},
		{"everybody else", alice.String() + " alice all\n* guest call=a",
			map[string]*grant{alice.String(): {name: "alice", call: []string{"*"}, serve: []string{"*"}, manage: true}}, &grant{name: "guest", call: []string{"a"}}},
		{"capitals in the digits", publicPrefix + strings.ToUpper(strings.TrimPrefix(alice.String(), publicPrefix)) + " alice manage",
			map[string]*grant{alice.String(): {name: "alice", manage: true}}, nil},
		{"two keys of one holder", alice.String() + " alice manage\n" + bob.String() + " alice manage",
			map[string]*grant{alice.String(): {name: "alice", manage: true}, bob.String(): {name: "alice", manage: true}}, nil},
		{"Z85", alice.z85() + " alice manage", map[string]*grant{alice.String(): {name: "alice", manage: true}}, nil},
		{"all characters of a name", alice.String() + " A-z_0.9 manage", map[string]*grant{alice.String(): {name: "A-z_0.9", manage: true}}, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			list, err := parseAccess(test.text, "authorized")
			if err != nil {
				t.Fatal(err)
			}
			if test.want == nil {
				test.want = map[string]*grant{}
			}
			if !reflect.DeepEqual(list.grants, test.want) || !reflect.DeepEqual(list.anybody, test.anybody) {
				t.Errorf("got %v and %v for all others, want %v and %v", list.grants, list.anybody, test.want, test.anybody)
			}
		})
	}
}

// In Z85, # is a digit like others, but never the first one: that would be more than 32 bits. In the file it
// begins a comment, at the start of a word.
func TestKeyInZ85MayHaveTheSignOfAComment(t *testing.T) {
	var key publicKey
	for i := 0; !strings.Contains(key.z85(), "#"); i++ {
		key = keyOf(fmt.Sprint(i))
	}
	list, err := parseAccess(key.z85()+" alice call=a#b # "+key.z85()+" bob manage\n", "authorized")
	if err != nil {
		t.Fatal(err)
	}
	if g := list.of(key.String()); g == nil || g.name != "alice" || !slices.Equal(g.call, []string{"a#b"}) {
		t.Errorf("the grant of %s is %+v", key.z85(), g)
	}
	for _, comment := range []string{"#" + key.z85() + " alice manage\n", "# " + key.z85() + " alice manage\n", strings.Repeat("#", z85Length) + " x manage\n"} {
		if list, err := parseAccess(comment, "authorized"); err != nil || len(list.grants) > 0 {
			t.Errorf("the comment %q became %v, %v", comment, list, err)
		}
	}
}

func TestBadFileOfKeysIsRefusedWithTheLine(t *testing.T) {
	alice := keyOf("alice")
	secret := secretKey(keyOf("secret"))
	digits := strings.TrimPrefix(alice.String(), publicPrefix)
	for _, test := range []struct{ text, want string }{
		{alice.String(), "1: a line has a key, a name and what the holder may do: call=, serve=, manage or all"},
		{"\n# x\n" + alice.String() + " alice", "3: a line has a key, a name and what the holder may do: call=, serve=, manage or all"},
		{alice.String() + " alice # call=a", "1: a line has a key, a name and what the holder may do: call=, serve=, manage or all"},
		{"\r\n" + alice.String() + " alice\r\n", "2: a line has a key, a name and what the holder may do: call=, serve=, manage or all"},
		{alice.String() + " al/ice all", `1: the name "al/ice" has a character other than A-Z a-z 0-9 . _ -`},
		{alice.String() + " al@ice all", `1: the name "al@ice" has a character other than A-Z a-z 0-9 . _ -`},
		{alice.String() + " alicé all", `1: the name "alicé" has a character other than A-Z a-z 0-9 . _ -`},
		{alice.String() + " call=a serve=a", "1: a line has a key, a name and what the holder may do: call=, serve=, manage or all"},
		{alice.String() + " * all", `1: the name "*" has a character other than A-Z a-z 0-9 . _ -`},
		{alice.String() + " alice some", `1: "some" is none of call=, serve=, manage and all`},
		{alice.String() + " alice call", `1: "call" is none of call=, serve=, manage and all`},
		{alice.String() + " alice manage=x", `1: "manage=x" is none of call=, serve=, manage and all`},
		{alice.String() + " alice all=", `1: "all=" is none of call=, serve=, manage and all`},
		{alice.String() + " alice ALL", `1: "ALL" is none of call=, serve=, manage and all`},
		{alice.String() + " alice call=a, b", `1: "b" is none of call=, serve=, manage and all`},
		{alice.String() + " alice call=", "1: call= and serve= have names of services with commas between them, and no blanks"},
		{alice.String() + " alice call=a,,b", "1: call= and serve= have names of services with commas between them, and no blanks"},
		{alice.String() + " alice call=a,", "1: call= and serve= have names of services with commas between them, and no blanks"},
		{alice.String() + " alice call=a serve=", "1: call= and serve= have names of services with commas between them, and no blanks"},
		{alice.String() + " alice call=a[", `1: "a[" is not a name of a service or a pattern such as build-*`},
		{alice.String() + " alice call=[!a]*", `1: "[!a]*" is not a name of a service or a pattern such as build-*`}, // It would mean ! or a.
		{alice.String() + " alice serve=[]", `1: "[]" is not a name of a service or a pattern such as build-*`},
		{alice.String() + " alice call=x*[b-", `1: "x*[b-" is not a name of a service or a pattern such as build-*`},
		{alice.String() + ` alice call=a\`, `1: "a\\" is not a name of a service or a pattern such as build-*`},
		{alice.String() + " alice all\n\n" + alice.String() + " bob all", "3: " + alice.String() + " has a line already"},
		{alice.String() + " alice all\n" + alice.z85() + " bob all", "2: " + alice.String() + " has a line already"},
		{"* a all\n* b all", "2: * has a line already"},
		{"** a all", `1: "**" is not a public key (bbpub- and 64 hexadecimal digits)`},
		{"alice alice all", `1: "alice" is not a public key (bbpub- and 64 hexadecimal digits)`},
		{digits + " alice all", `1: "` + digits + `" is not a public key (bbpub- and 64 hexadecimal digits)`},
		{publicPrefix + " alice all", `1: "bbpub-" is not a public key (bbpub- and 64 hexadecimal digits)`},
		{alice.String()[:69] + " alice all", `1: "` + alice.String()[:69] + `" is not a public key (bbpub- and 64 hexadecimal digits)`},
		{alice.String() + "00 alice all", `1: "` + alice.String() + `00" is not a public key (bbpub- and 64 hexadecimal digits)`},
		{"BBPUB-" + digits + " alice all", `1: "BBPUB-` + digits + `" is not a public key (bbpub- and 64 hexadecimal digits)`},
		{alice.String()[:69] + "g alice all", `1: "` + alice.String()[:69] + `g" is not a public key (bbpub- and 64 hexadecimal digits)`},
		{alice.z85()[:39] + " alice all", `1: "` + alice.z85()[:39] + `" is not a public key (bbpub- and 64 hexadecimal digits)`},
		{alice.z85()[:39] + "~ alice all", `1: "` + alice.z85()[:39] + `~" is not a public key (bbpub- and 64 hexadecimal digits)`},
		{strings.Repeat("%", 40) + " alice all", `1: "` + strings.Repeat("%", 40) + `" is not a public key (bbpub- and 64 hexadecimal digits)`}, // more than 32 bits
		{secretPrefix + digits + " alice all", "1: that is a secret key, which nobody else may see; a public key is wanted"},
		{secretPrefix + digits[:10] + " alice all", "1: that is a secret key, which nobody else may see; a public key is wanted"},
		{secret.String() + " alice all", "1: that is a secret key, which nobody else may see; a public key is wanted"},
	} {
		list, err := parseAccess(test.text, "authorized")
		if err == nil {
			t.Errorf("%q became %v", test.text, list)
		} else if want := "authorized:" + test.want; err.Error() != want {
			t.Errorf("%q: the error is %q, want %q", test.text, err, want)
		}
	}
}

func TestPatternsOfServices(t *testing.T) {
	for _, test := range []struct {
		glob, name string
		want       bool
	}{
		{"build", "build", true},
		{"build", "build2", false},
		{"build", "Build", false},
		{"build", "", false},
		{"build-*", "build-arm", true},
		{"build-*", "build-", true},
		{"build-*", "build", false},
		{"build-*", "rebuild-arm", false},
		{"build-*", "build-a/b", false}, // * does not go beyond a /
		{"build-*/*", "build-a/b", true},
		{"*", "build", true},
		{"*", "a/b/c", true}, // alone it is every name
		{"*", "odd\tname\n\xff", true},
		{"**", "a/b", false},
		{"?", "a", true},
		{"?", "é", true},
		{"?", "ab", false},
		{"?", "/", false},
		{"?", "\xff", true},
		{"[a-c]", "b", true},
		{"[a-c]", "d", false},
		{"[a-c]", "bb", false},
		{"[^a-c]", "d", true},
		{"[^a-c]", "b", false},
		{`\*`, "*", true},
		{`\*`, "x", false},
		{"x[", "x[", false}, // a bad pattern allows nothing
	} {
		caller := &grant{call: []string{"other", test.glob}}
		server := &grant{serve: []string{test.glob, "other"}}
		if got := caller.mayCall(test.name); got != test.want {
			t.Errorf("call=%s and %q: %v, want %v", test.glob, test.name, got, test.want)
		}
		if got := server.mayServe(test.name); got != test.want {
			t.Errorf("serve=%s and %q: %v, want %v", test.glob, test.name, got, test.want)
		}
		if caller.mayServe(test.name) || server.mayCall(test.name) {
			t.Errorf("who may call or serve %q may do the other, too", test.name)
		}
	}
}

func TestManagementServicesWantARightOfTheirOwn(t *testing.T) {
	all := []string{mmiService, mmiCancel, mmiServices, mmiMetrics, "mmi.nonsense", "mmi."}
	callers := all[:3] // what all may who may call
	for _, test := range []struct {
		name  string
		grant *grant
		may   []string
	}{
		{"nil", nil, nil},
		{"nothing", &grant{}, nil},
		{"serve", &grant{serve: []string{"*"}}, nil},
		{"call", &grant{call: []string{"x"}}, callers},
		{"call=*", &grant{call: []string{"*"}}, callers},
		{"call=mmi.*", &grant{call: []string{"mmi.*"}}, callers},
		{"call=mmi.metrics", &grant{call: []string{"mmi.metrics"}}, callers},
		{"manage", &grant{manage: true}, all},
		{"all", ipcGrant, all},
	} {
		for _, service := range all {
			if got, want := test.grant.mayCall(service), slices.Contains(test.may, service); got != want {
				t.Errorf("%s: %s is allowed: %v, want %v", test.name, service, got, want)
			}
		}
	}
	if (&grant{manage: true}).mayCall("x") {
		t.Error("manage allows to call any service")
	}
}

func TestNoGrantAllowsNothing(t *testing.T) {
	var none *grant
	for _, name := range []string{"", "x", "*", mmiService, mmiMetrics} {
		if none.mayCall(name) || none.mayServe(name) {
			t.Errorf("it allows %q", name)
		}
	}
	if got := none.holder(); got != "this key" {
		t.Errorf("it is called %q", got)
	}
}

func TestRequestThatAKeyMayNotMakeGets77AndLeavesNothingBehind(t *testing.T) {
	r := newGuardedRouter(t, "alice call=other")
	r.by("alice", "C", "7", "", "MDPC01", "build", "x")
	r.expect([]string{"C", "7", "", "MDPC01", "build", "", "bbroker: build: alice may not call it\n", "exit status 077"})
	r.by("mallory", "D", "", "MDPC01", "build", "x") // has no line
	r.expect(notAllowedTo("D", "build", "this key"))
	r.by("mallory", "D", "", "MDPC01", "mmi.service", "other")
	r.expect(notAllowedTo("D", "mmi.service", "this key"))
	r.expectNothingHeld()
	r.pass(1)
	if len(r.clients) > 0 {
		t.Errorf("the broker remembers %d clients", len(r.clients))
	}
	r.by(ipcUser, "W", "", "MDPW01", "\x01", "build")
	r.expect()
}

func TestReadyThatAKeyMayNotSendMakesNoWorker(t *testing.T) {
	r := newGuardedRouter(t, "alice call=*", "bob serve=other")
	r.by("bob", "W", "", "MDPW01", "\x01", "build")
	r.expect(disconnectTo("W")) // without a reason, which a worker of others may not understand
	r.by("bob", "bservice.1", "", "MDPW01", "\x01", "build")
	r.expect([]string{"bservice.1", "", "MDPW01", "\x05", "77", "bob may not serve build"})
	r.by("alice", "bservice.2", "", "MDPW01", "\x01", "build")
	r.expect([]string{"bservice.2", "", "MDPW01", "\x05", "77", "alice may not serve build"})
	r.by("mallory", "bservice.3", "", "MDPW01", "\x01", "build")
	r.expect([]string{"bservice.3", "", "MDPW01", "\x05", "77", "this key may not serve build"})
	r.expectNothingHeld()
	if len(r.workers) > 0 {
		t.Errorf("there are %d workers", len(r.workers))
	}
	r.by("alice", "C", "", "MDPC01", "build", "x")
	r.expect()
	r.by("bob", "W", "", "MDPW01", "\x01", "other")
	r.by("alice", "C", "", "MDPC01", "other", "y")
	r.expect(toWorker("W", "*", "y"))
	if got := r.total.counts[unauthorizedTotal]; got != 4 {
		t.Errorf("%d times something was not allowed, want 4", got)
	}
}

func TestKeysMayNotServeTheNamesOfTheBroker(t *testing.T) {
	r := newGuardedRouter(t, "alice all")
	r.by("alice", "W", "", "MDPW01", "\x01", "mmi.metrics")
	r.expect(disconnectTo("W"))
	r.by(ipcUser, "W", "", "MDPW01", "\x01", "mmi.metrics")
	r.expect(disconnectTo("W"))
	r.expectNothingHeld()
}

func TestTokenEndsInTheNameOfTheCaller(t *testing.T) {
	r := newGuardedRouter(t, "alice call=*", "bob serve=*")
	r.by("bob", "W", "", "MDPW01", "\x01", "echo")
	r.by("alice", "C", "", "MDPC01", "echo", "x")
	token := r.expect(toWorker("W", "*", "x"))[0]
	if !strings.HasSuffix(token, "@alice") {
		t.Errorf("the token is %q", token)
	}
	r.by("bob", "W", "", "MDPW01", "\x03", token, "", "y")
	r.expect([]string{"C", "", "MDPC01", "echo", "y"})
	r.by(ipcUser, "I", "", "MDPC01", "echo", "x")
	if token := r.expect(toWorker("W", "*", "x"))[0]; strings.Contains(token, "@") {
		t.Errorf("the token of somebody without a name is %q", token)
	}
}

func TestAnotherUserWithTheIdentityOfAClientCannotCancelOrReceive(t *testing.T) {
	r := newGuardedRouter(t, "alice call=*", "mallory call=*", "bob serve=*")
	r.by("bob", "W", "", "MDPW01", "\x01", "echo")
	r.by("alice", "C", "", "MDPC01", "echo", "in flight")
	token := r.expect(toWorker("W", "*", "in flight"))[0]
	r.by("alice", "C", "", "MDPC01", "echo", "waits")

	// ZeroMQ gives the identity to somebody else only when the connection of the first is gone. What
	// waits is dropped for that reason. It is not for the second to cancel, nor to learn of.
	r.by("mallory", "C", "", "MDPC01", "mmi.cancel")
	r.expect([]string{"C", "", "MDPC01", "mmi.cancel", "404"})
	if cancelled, abandoned := r.total.counts[cancelledTotal], r.total.counts[abandonedTotal]; cancelled != 0 || abandoned != 1 {
		t.Errorf("%d requests were cancelled and %d abandoned, want 0 and 1", cancelled, abandoned)
	}
	r.by("bob", "W", "", "MDPW01", "\x03", token, "", "for Alice")
	r.expect()
	if dropped := r.total.counts[droppedRepliesTotal]; dropped != 1 {
		t.Errorf("%d replies were dropped, want 1", dropped)
	}
	r.expectNothingHeld("echo")

	// What the second asks for itself it gets.
	r.by("mallory", "C", "", "MDPC01", "echo", "mine")
	token = r.expect(toWorker("W", "*", "mine"))[0]
	r.by("bob", "W", "", "MDPW01", "\x03", token, "", "for Mallory")
	r.expect([]string{"C", "", "MDPC01", "echo", "for Mallory"})
}

func TestForbiddenMessageInsteadOfAClientIsEnoughToLoseItsReplies(t *testing.T) {
	r := newGuardedRouter(t, "alice call=*", "bob serve=*")
	r.by("bob", "W", "", "MDPW01", "\x01", "echo")
	r.by("alice", "C", "", "MDPC01", "echo", "x")
	token := r.expect(toWorker("W", "*", "x"))[0]
	r.by("mallory", "C", "", "MDPC01", "echo", "x") // has no line
	r.expect(notAllowedTo("C", "echo", "this key"))
	r.by("bob", "W", "", "MDPW01", "\x03", token, "", "for Alice")
	r.expect()
}

func TestReplyIsForTheConnectionThatAsked(t *testing.T) {
	r := newGuardedRouter(t, "alice call=*", "bob serve=*")
	r.by("bob", "W", "", "MDPW01", "\x01", "echo")
	r.over(7, "alice", "C", "", "MDPC01", "echo", "x")
	token := r.expect(toWorker("W", "*", "x"))[0]
	r.Disconnected(7, r.clock) // From now on, anybody may have the identity.
	r.by("bob", "W", "", "MDPW01", "\x03", token, "", "for Alice")
	r.expect()
}

func TestRequestThatComesBackWhenItsClientWasReplacedIsDropped(t *testing.T) {
	r := newGuardedRouter(t, "alice call=*", "mallory call=*", "bob serve=*")
	r.by("bob", "W1", "", "MDPW01", "\x01", "echo")
	r.by("alice", "C", "", "MDPC01", "echo", "for nobody")
	r.expect(toWorker("W1", "*", "for nobody"))
	r.by("mallory", "C", "", "MDPC01", "mmi.service", "echo")
	r.sent = nil
	r.by("bob", "W1", "", "MDPW01", "\x05")
	r.by("bob", "W2", "", "MDPW01", "\x01", "echo")
	r.expect()
	r.expectNothingHeld("echo")
}

func TestAnotherUserWithTheIdentityOfAWorkerCannotReply(t *testing.T) {
	for name, rule := range map[string]string{"may serve": "mallory serve=*", "may call": "mallory call=*"} {
		t.Run(name, func(t *testing.T) {
			r := newGuardedRouter(t, "alice call=*", "bob serve=*", rule)
			r.by("bob", "W", "", "MDPW01", "\x01", "echo")
			r.by("alice", "C", "", "MDPC01", "echo", "x")
			token := r.expect(toWorker("W", "*", "x"))[0]
			r.by("mallory", "W", "", "MDPW01", "\x03", token, "", "forged")
			if slices.ContainsFunc(r.sent, func(m []string) bool { return slices.Contains(m, "forged") }) {
				t.Errorf("the broker sent %q", r.sent)
			}
			if !slices.ContainsFunc(r.sent, func(m []string) bool { return slices.Equal(m, lostReply("C", "echo")) }) {
				t.Errorf("the broker sent %q, want 69 for the client", r.sent)
			}
			r.expectNothingHeld()
		})
	}
}

func TestRequestDoesNotGoToTheIdentityOfAWorkerWhoseConnectionBroke(t *testing.T) {
	r := newGuardedRouter(t, "alice call=*", "bob serve=*")
	r.over(7, "bob", "W", "", "MDPW01", "\x01", "echo")
	r.Disconnected(7, r.clock) // From now on, anybody may have the identity.
	r.by("alice", "C", "", "MDPC01", "echo", "x")
	r.expect()
	r.over(8, "bob", "W2", "", "MDPW01", "\x01", "echo")
	r.expect(toWorker("W2", "*", "x"))
}

// A message may be received after its connection broke, and when a newer one has its descriptor. Whoever has
// the identity then gets nothing that is for its sender.
func TestNothingIsSentToAPeerThatWasGoneWhenItsMessageWasReceived(t *testing.T) {
	for _, reused := range []bool{false, true} {
		t.Run(fmt.Sprint("descriptor in use again=", reused), func(t *testing.T) {
			r := newGuardedRouter(t, "alice call=*", "bob serve=*")
			leave := func(source int, name string) sender {
				r.Accepted(source)
				from := sender{source, userOf(name), r.accepted}
				r.Disconnected(source, r.clock)
				if reused {
					r.Accepted(source)
				}
				return from
			}
			r.Receive(frames("V", "", "MDPW01", "\x01", "echo"), leave(8, "bob"), r.clock)
			from := leave(9, "alice")
			r.Receive(frames("C", "", "MDPC01", "mmi.service", "echo"), from, r.clock)
			r.Receive(frames("C", "", "MDPC01", "echo", "x"), from, r.clock)
			r.Receive(frames("C", "", "MDPC01", "mmi.metrics"), from, r.clock)
			r.expect()
			r.by("bob", "W", "", "MDPW01", "\x01", "echo")
			token := r.expect(toWorker("W", "*", "x"))[0]
			r.by("bob", "W", "", "MDPW01", "\x03", token, "", "for the first connection")
			r.expect()

			// Over another connection it is served.
			r.over(10, "alice", "C", "", "MDPC01", "echo", "y")
			token = r.expect(toWorker("W", "*", "y"))[0]
			r.by("bob", "W", "", "MDPW01", "\x03", token, "", "for the second")
			r.expect([]string{"C", "", "MDPC01", "echo", "for the second"})
		})
	}
}

func TestGuardAdmitsKnownKeysOnTCPAndAllOnIPC(t *testing.T) {
	g := &guard{log: noLog, unknown: map[string]time.Time{}}
	g.list.Store(accessFor(t, "alice call=*"))
	key := func(name string) string { k := keyOf(name); return string(k[:]) }
	for _, test := range []struct {
		question []string
		user     string
	}{
		{[]string{"1.0", "1", "tcp", "192.0.2.1", "me", "CURVE", key("alice")}, userOf("alice")},
		{[]string{"1.0", "1", "ipc", "localhost", "me", "NULL"}, ipcUser},
		{[]string{"1.0", "1", "tcp", "192.0.2.1", "me", "CURVE", key("mallory")}, ""},
		{[]string{"1.0", "1", "tcp", "192.0.2.1", key("alice"), "CURVE", key("mallory")}, ""},
		{[]string{"1.0", "1", "tcp", "192.0.2.1", "me", "CURVE", key("alice")[1:]}, ""},
		{[]string{"1.0", "1", "tcp", "192.0.2.1", "me", "CURVE", key("alice"), "x"}, ""},
		{[]string{"1.0", "1", "tcp", "192.0.2.1", "me", "CURVE"}, ""},
		{[]string{"1.0", "1", "tcp", "192.0.2.1", "me", "PLAIN", key("alice"), ""}, ""},
		{[]string{"1.0", "1", "tcp", "localhost", "me", "NULL"}, ""},
		{[]string{"1.0", "1", "", "localhost", "me", "NULL"}, ""},
		{[]string{"1.0", "1", "ipc", "localhost", "me", "CURVE", key("alice")}, ""},
		{[]string{"2.0", "1", "ipc", "localhost", "me", "NULL"}, ""},
		{[]string{"1.0", "1", "ipc", "localhost", "me"}, ""},
		{[]string{"1.0"}, ""},
		{nil, ""},
	} {
		status, id := "200", test.user+" 7"
		if test.user == "" {
			status, id = "400", ""
		}
		answer := g.answer(framesOf(test.question), 7)
		if len(answer) != 6 || string(answer[0]) != "1.0" || string(answer[2]) != status || string(answer[4]) != id {
			t.Errorf("the answer to %q is %q, want status %s and user %q", test.question, answer, status, id)
		}
	}
}

func TestConnectionWhoseNumberIsNotKnownCountsAsGone(t *testing.T) {
	r := newGuardedRouter(t, "alice call=*")
	r.Accepted(7)
	for _, from := range []sender{{-1, userOf("alice"), 1}, {8, userOf("alice"), 1}, {7, userOf("alice"), 0}} {
		r.Receive(frames("C", "", "MDPC01", "mmi.service", "x"), from, r.clock)
		r.expect()
	}
	r.Receive(frames("C", "", "MDPC01", "mmi.service", "x"), sender{7, userOf("alice"), 1}, r.clock)
	r.expect([]string{"C", "", "MDPC01", "mmi.service", "404"})
	for _, text := range []string{"", " ", "ipc", "ipc ", "ipc x", "ipc -1", " 1"} {
		if user, _ := parseUserID(text); user != "" {
			t.Errorf("%q is the ID of the user %q", text, user)
		}
	}
	if user, admitted := parseUserID(userID("ipc", 7)); user != "ipc" || admitted != 7 {
		t.Errorf("the user is %q and the number %d", user, admitted)
	}
}

// ZeroMQ would drop answers that a client has no time to read.
func TestManyRequestsOfARevokedClientEndAFewAtATimeAndNoneBegins(t *testing.T) {
	r := newGuardedRouter(t, "alice call=*", "carol call=*", "bob serve=*")
	r.by("bob", "W", "", "MDPW01", "\x01", "echo")
	r.by("carol", "K", "", "MDPC01", "echo", "first")
	token := r.expect(toWorker("W", "*", "first"))[0]
	const count = 2*maxEnded + 5
	r.MaxQueue, r.MaxMemory = 2*count, 1<<30
	for range count {
		r.by("alice", "C", "", "MDPC01", "echo", "x")
	}
	r.by("carol", "K", "", "MDPC01", "echo", "second")
	r.SetAccess(accessFor(t, "carol call=*", "bob serve=*"))
	r.by("bob", "W", "", "MDPW01", "\x03", token, "", "done")
	ended := 0
	for _, want := range []int{maxEnded, maxEnded, 5, 0} {
		got := 0
		for _, message := range r.sent {
			if slices.Equal(message, notAllowedTo("C", "echo", "this key")) {
				got++
			}
			if len(message) > 3 && message[3] == "\x02" && slices.Contains(message, "x") {
				t.Fatal("a request began that its client may not make")
			}
			if slices.Contains(message, "second") {
				ended++
			}
		}
		if got != want {
			t.Fatalf("%d requests ended at a time, want %d", got, want)
		}
		r.sent = nil
		r.Tick(r.clock)
	}
	if ended != 1 {
		t.Errorf("what is still allowed began %d times", ended)
	}
}

func TestRevokedClientGets77ForWhatWaitsAtOnce(t *testing.T) {
	r := newGuardedRouter(t, "alice call=*", "carol call=*", "bob serve=*")
	r.by("bob", "W", "", "MDPW01", "\x01", "echo")
	r.by("carol", "K", "", "MDPC01", "echo", "first")
	token := r.expect(toWorker("W", "*", "first"))[0]
	r.by("alice", "C", "", "MDPC01", "echo", "second")
	r.by("alice", "C", "", "MDPC01", "nobody", "third")
	r.by("carol", "K", "", "MDPC01", "echo", "fourth")
	r.SetAccess(accessFor(t, "alice call=other", "carol call=*", "bob serve=*"))
	slices.SortFunc(r.sent, func(x, y []string) int { return strings.Compare(x[3], y[3]) })
	r.expect(notAllowedTo("C", "echo", "alice"), notAllowedTo("C", "nobody", "alice"))

	// What is still allowed goes on.
	r.by("bob", "W", "", "MDPW01", "\x03", token, "", "done")
	token = r.expect([]string{"K", "", "MDPC01", "echo", "done"}, toWorker("W", "*", "fourth"))[0]
	r.by("bob", "W", "", "MDPW01", "\x03", token, "", "done")
	r.expect([]string{"K", "", "MDPC01", "echo", "done"})
	r.expectNothingHeld("echo")
	if got := r.total.counts[unauthorizedTotal]; got != 2 {
		t.Errorf("%d times something was not allowed, want 2", got)
	}
}

func TestRevokedKeyIsRefusedOverAConnectionThatIsStillThere(t *testing.T) {
	r := newGuardedRouter(t, "alice call=*")
	r.by("alice", "C", "", "MDPC01", "mmi.service", "x")
	r.expect([]string{"C", "", "MDPC01", "mmi.service", "404"})
	r.SetAccess(accessFor(t))
	r.by("alice", "C", "", "MDPC01", "mmi.service", "x")
	r.expect(notAllowedTo("C", "mmi.service", "this key"))
}

func TestReplyToARevokedClientIsWithheld(t *testing.T) {
	r := newGuardedRouter(t, "alice call=*", "bob serve=*")
	r.by("bob", "W", "", "MDPW01", "\x01", "echo")
	r.by("alice", "C", "", "MDPC01", "echo", "x")
	token := r.expect(toWorker("W", "*", "x"))[0]
	r.SetAccess(accessFor(t, "bob serve=*"))
	r.expect()
	r.by("bob", "W", "", "MDPW01", "\x03", token, "", "done")
	r.expect(withheldFrom("C", "echo", "this key"))
	r.expectNothingHeld("echo")
}

func TestRequestOfARevokedClientDoesNotBeginAgain(t *testing.T) {
	for name, test := range map[string]struct {
		lose func(r *fakeRouter)
		want []string
	}{
		"returned by its worker": {func(r *fakeRouter) { r.by("bob", "W1", "", "MDPW01", "\x05") }, notAllowedTo("C", "echo", "this key")},
		"with a lost worker": {func(r *fakeRouter) {
			r.failed["W1"] = errGone
			r.Disconnected(7, r.clock)
			r.pass(1)
			r.sent = r.sent[slices.IndexFunc(r.sent, func(m []string) bool { return m[0] == "C" }):]
		}, lostReply("C", "echo")},
	} {
		t.Run(name, func(t *testing.T) {
			r := newGuardedRouter(t, "alice call=*", "bob serve=*")
			r.Redeliver = 3
			r.over(7, "bob", "W1", "", "MDPW01", "\x01", "echo")
			r.by("alice", "C", "", "MDPC01", "echo", "x")
			r.expect(toWorker("W1", "*", "x"))
			r.SetAccess(accessFor(t, "bob serve=*"))
			test.lose(r)
			r.expect(test.want)
			r.by("bob", "W2", "", "MDPW01", "\x01", "echo")
			r.expect()
			r.expectNothingHeld("echo")
		})
	}
}

func TestRevokedWorkerIsDisconnectedAndItsRequestEndsAsOfALostOne(t *testing.T) {
	r := newGuardedRouter(t, "alice call=*", "bob serve=*", "dave serve=*")
	r.by("bob", "busy", "", "MDPW01", "\x01", "echo")
	r.by("alice", "C", "", "MDPC01", "echo", "x")
	token := r.expect(toWorker("busy", "*", "x"))[0]
	r.by("bob", "idle", "", "MDPW01", "\x01", "other")
	r.by("dave", "stays", "", "MDPW01", "\x01", "third")
	r.SetAccess(accessFor(t, "alice call=*", "bob serve=third", "dave serve=*"))
	slices.SortFunc(r.sent, func(x, y []string) int { return strings.Compare(x[0], y[0]) })
	r.expect(lostReply("C", "echo"), disconnectTo("busy"), disconnectTo("idle"))
	r.expectNothingHeld("third")

	r.by("bob", "busy", "", "MDPW01", "\x03", token, "", "late")
	r.expect(disconnectTo("busy"))
	r.by("alice", "C", "", "MDPC01", "third", "y")
	r.expect(toWorker("stays", "*", "y"))
	if lost := r.total.counts[lostWorkersTotal]; lost != 2 {
		t.Errorf("%d workers were lost, want 2", lost)
	}
}

func TestRequestIsNotRedeliveredToAWorkerThatIsRevokedWithItsFirst(t *testing.T) {
	// In whichever order the broker looks at them.
	for range 20 {
		r := newGuardedRouter(t, "alice call=*", "bob serve=*", "dave serve=*")
		r.Redeliver = 1000
		r.by("bob", "W0", "", "MDPW01", "\x01", "echo")
		r.by("alice", "C", "", "MDPC01", "echo", "x")
		r.expect(toWorker("W0", "*", "x"))
		for i := range 5 {
			r.by("bob", fmt.Sprint("W", 1+i), "", "MDPW01", "\x01", "echo")
		}
		r.by("dave", "stays", "", "MDPW01", "\x01", "echo")
		r.SetAccess(accessFor(t, "alice call=*", "dave serve=*"))
		for _, m := range r.sent {
			if m[3] == "\x02" && m[0] != "stays" {
				t.Fatalf("%s got the request", m[0])
			}
		}
		if w := r.workers["stays"]; w == nil || w.request == nil {
			t.Fatal("the worker that may serve did not get the request")
		}
	}
}

func TestRevokedClientIsNotServedByAWorkerOfAnotherThatIsRevoked(t *testing.T) {
	for range 20 {
		r := newGuardedRouter(t, "alice call=*", "bob serve=*", "dave serve=*")
		r.Redeliver = 1000
		r.by("bob", "W", "", "MDPW01", "\x01", "echo")
		r.by("alice", "C", "", "MDPC01", "echo", "x")
		r.by("dave", "stays", "", "MDPW01", "\x01", "echo")
		r.sent = nil
		r.SetAccess(accessFor(t, "dave serve=*"))
		r.expect(disconnectTo("W"), lostReply("C", "echo"))
		r.expectNothingHeld("echo")
	}
}

func TestMessageOfNobodyDoesNothingOnABrokerWithKeys(t *testing.T) {
	// Not even what everybody else may do.
	text := "* guest all\n" + keyOf("bob").String() + " bob serve=*\n"
	list, err := parseAccess(text, "authorized")
	if err != nil {
		t.Fatal(err)
	}
	r := newFakeRouter(t)
	r.SetAccess(list)
	for _, service := range []string{"echo", "mmi.service", "mmi.services", "mmi.metrics", "mmi.cancel"} {
		r.by("", "C", "", "MDPC01", service, "x")
		r.expect(notAllowedTo("C", service, "this key"))
	}
	r.by("", "W", "", "MDPW01", "\x01", "echo")
	r.expect(disconnectTo("W"))
	r.expectNothingHeld()
	r.by("bob", "W", "", "MDPW01", "\x01", "echo")
	r.by("stranger", "C", "", "MDPC01", "echo", "x")
	token := r.expect(toWorker("W", "*", "x"))[0]
	r.by("", "W", "", "MDPW01", "\x03", token, "", "forged")
	if slices.ContainsFunc(r.sent, func(m []string) bool { return slices.Contains(m, "forged") }) {
		t.Errorf("the broker sent %q", r.sent)
	}
}

func TestPeersOnIPCMayDoAllWithoutALine(t *testing.T) {
	r := newGuardedRouter(t)
	r.by(ipcUser, "W", "", "MDPW01", "\x01", "echo")
	r.by(ipcUser, "C", "", "MDPC01", "echo", "x")
	token := r.expect(toWorker("W", "*", "x"))[0]
	r.SetAccess(accessFor(t))
	r.by(ipcUser, "W", "", "MDPW01", "\x03", token, "", "y")
	r.expect([]string{"C", "", "MDPC01", "echo", "y"})
	r.by(ipcUser, "C", "", "MDPC01", "mmi.metrics")
	r.expect([]string{"C", "", "MDPC01", "mmi.metrics", "*"})
	if got := r.total.counts[unauthorizedTotal]; got != 0 {
		t.Errorf("%d times something was not allowed", got)
	}
}

func TestListOfServicesHasWhatOneMayCall(t *testing.T) {
	r := newGuardedRouter(t, "alice call=a*", "mona manage", "both call=b manage", "bob serve=*")
	for _, name := range []string{"a1", "a2", "b"} {
		r.by("bob", "W"+name, "", "MDPW01", "\x01", name)
	}
	row := func(name string) string { return name + "\t1\t1\t0\t0\t0\t0\n" }
	for _, test := range []struct{ name, want string }{
		{"alice", row("a1") + row("a2")},
		{"mona", row("a1") + row("a2") + row("b")},
		{"both", row("a1") + row("a2") + row("b")},
		{ipcUser, row("a1") + row("a2") + row("b")},
	} {
		r.by(test.name, "C"+test.name, "", "MDPC01", "mmi.services")
		r.expect([]string{"C" + test.name, "", "MDPC01", "mmi.services", servicesHeader + test.want})
	}
	r.by("bob", "Cbob", "", "MDPC01", "mmi.services")
	r.expect(notAllowedTo("Cbob", "mmi.services", "bob"))
}

// A long list is made once a second. It must not be shown to those who may see another one.
func TestListThatIsKeptForASecondIsNotShownToOthers(t *testing.T) {
	r := newGuardedRouter(t, "alice call=a", "carol call=c", "mona manage", "bob serve=*")
	for i := range freshServices + 1 {
		r.by("bob", fmt.Sprint("W", i), "", "MDPW01", "\x01", fmt.Sprint("s", i))
	}
	r.by("bob", "Wa", "", "MDPW01", "\x01", "a")
	r.by("bob", "Wc", "", "MDPW01", "\x01", "c")
	list := func(name string) string {
		r.by(name, "C"+name, "", "MDPC01", "mmi.services")
		return r.expect([]string{"C" + name, "", "MDPC01", "mmi.services", "*"})[0]
	}
	if got := list("mona"); strings.Count(got, "\n") != freshServices+4 {
		t.Errorf("who may manage sees %q", got)
	}
	for name, service := range map[string]string{"alice": "a", "carol": "c"} {
		if got, want := list(name), servicesHeader+service+"\t1\t1\t0\t0\t0\t0\n"; got != want {
			t.Errorf("%s sees %.200q, want %q", name, got, want)
		}
	}
	r.SetAccess(accessFor(t, "alice call=c", "bob serve=*"))
	if got, want := list("alice"), servicesHeader+"c\t1\t1\t0\t0\t0\t0\n"; got != want {
		t.Errorf("after a change she sees %.200q, want %q", got, want)
	}
}

func TestLogTellsOfAKeyOnceAMinuteAndTheMetricCountsEachTime(t *testing.T) {
	r := newGuardedRouter(t, "alice call=other", "carol call=other")
	for range 5 {
		r.by("alice", "C", "", "MDPC01", "build", "x")
		r.by("alice", "C", "", "MDPC01", "build2", "x")
		r.by("alice", "W", "", "MDPW01", "\x01", "build")
		r.by("carol", "D", "", "MDPC01", "build", "x")
		r.by("mallory", "M", "", "MDPW01", "\x01", "build")
	}
	r.expectLog(1, "not allowed", "level=WARN", "key="+userOf("alice"), "name=alice", "call=build")
	r.expectLog(1, "not allowed", "key="+userOf("carol"), "name=carol", "call=build")
	r.expectLog(1, "not allowed", "key="+userOf("mallory"), `name="this key"`, "serve=build")
	r.expectLog(3, "not allowed")
	if got := r.total.counts[unauthorizedTotal]; got != 25 {
		t.Errorf("%d times something was not allowed, want 25", got)
	}
	r.by(ipcUser, "I", "", "MDPC01", "mmi.metrics")
	text := r.sent[len(r.sent)-1][4]
	if !strings.Contains(text, "\nbackbone_unauthorized_total 25\n") {
		t.Errorf("the metrics are %s", text)
	}
	r.pass(60)
	r.by("alice", "C", "", "MDPC01", "build", "x")
	r.expectLog(2, "not allowed", "name=alice")
}

func TestSecretKeysDoNotAppearInWhatIsPrinted(t *testing.T) {
	secret := secretKey(keyOf("secret"))
	keys := &linkKeys{broker: keyOf("broker"), own: &secret}
	address := brokerAddress{"tcp://127.0.0.1:5555", keys}
	digits := strings.TrimPrefix(keyOf("secret").String(), publicPrefix)
	spellings := []string{digits, strings.ToUpper(digits), secret.z85(), string(secret[:]),
		strings.Trim(fmt.Sprint([]byte(secret[:])), "[]"), strings.Trim(fmt.Sprintf("%#v", [keyLength]byte(secret)), "[32]uint8{}")}
	check := func(format string, value any) {
		printed := fmt.Sprintf(format, value)
		for _, spelling := range spellings {
			if strings.Contains(printed, spelling) {
				t.Errorf("%s of %T prints %q", format, value, printed)
			}
		}
	}
	for _, format := range []string{"%v", "%+v", "%s", "%q"} {
		for _, value := range []any{secret, &secret, keys, *keys, []secretKey{secret}, struct{ Key secretKey }{secret}, fmt.Errorf("bad key %v", secret)} {
			check(format, value)
		}
	}
	// What slog prints of anything else.
	for _, value := range []any{address, &address, &guard{key: &secret, file: "x"}, &Service{Broker: address}, &Client{brokers: []brokerAddress{address}}} {
		check("%v", value)
		check("%+v", value)
	}
}

// BenchmarkWhoMayCall measures what keys add to a request: the handshake asks for the key, and each message
// for what it allows.
func BenchmarkWhoMayCall(b *testing.B) {
	for _, keys := range []int{1, 100_000} {
		rules := make([]string, keys)
		for i := range rules {
			rules[i] = fmt.Sprintf("k%d call=build-*,deploy-* serve=x", i)
		}
		list := accessFor(b, rules...)
		last := keyOf(fmt.Sprint("k", keys-1))
		g := &guard{}
		g.list.Store(list)
		question := framesOf([]string{"1.0", "1", tcpDomain, "127.0.0.1", "", "CURVE", string(last[:])})
		b.Run(fmt.Sprintf("handshake/keys=%d", keys), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if g.admit(question) == "" {
					b.Fatal("the key is not known")
				}
			}
		})
		broker := NewBroker(testFlags, time.Now(), nil, noLog)
		broker.access = list
		user := last.String()
		b.Run(fmt.Sprintf("message/keys=%d", keys), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if !broker.grantOf(user).mayCall("deploy-web") {
					b.Fatal("the key may not call")
				}
			}
		})
	}
}
