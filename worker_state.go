package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A session is one registration with a broker, from the first READY to DISCONNECT. It is a state machine
// that knows no socket, no clock and no command: the loop around it calls a method for each event.
//
// A request needs a slot. If none is free, the session hands the request back and waits for one. The broker
// still knows it, but gives it nothing before READY, which it sends when it has a slot.
type session struct {
	*Service
	send  func(frames [][]byte) error
	wake  func()                        // makes the loop call Tick and Claim; any goroutine may call it
	start func(slot Handler, r Request) // starts to work on a request; Finish takes the reply

	// received returns how many bytes the broker has sent so far; 0 if that is unknown.
	received func() uint64

	over       error // why the session ended; nil while it lasts
	registered bool
	request    *Message // received and not started
	working    bool
	address    [][]byte // of the client whose request is in hand
	reply      *Message // finished but not sent
	finished   bool     // the last request was, and the broker may not know that yet

	// Of the request in hand:
	streams bool                    // its client takes partial replies
	credit  int                     // how many of them may be sent now
	stream  *stream                 // has them, while a command runs; nil unless streams
	cancel  context.CancelCauseFunc // ends the command

	slot     Handler   // for the command that runs, or reserved; nil for none
	reserved time.Time // until then; zero while a command runs
	place    *place    // among those that wait for a slot; nil unless this one does

	due        time.Time
	silence    int    // heartbeats since the broker was last heard
	heard      uint64 // bytes received, when the broker was last silent
	complained bool   // about a bad message
}

// unsent tells whether Flush has something to send when the broker can be reached.
func (s *session) unsent() bool {
	return s.over == nil && (!s.registered || s.reply != nil)
}

// Flush sends what the broker is owed: READY first of all, and a reply.
func (s *session) Flush() {
	if !s.registered {
		s.registered = s.deliver(s.ready())
		if s.registered {
			s.nextNotice = time.Time{}
			s.brokerLog.Info("service connected")
		}
	}
	if s.registered && s.reply != nil && s.deliver(*s.reply) {
		s.reply = nil
	}
}

// deliver sends a message and tells whether it could. It ends the session if it never will.
func (s *session) deliver(m Message) bool {
	err := s.send(m.Frames())
	if err != nil && err != errWouldBlock {
		s.end(err)
	}
	return err == nil
}

// mustDeliver sends a message for which the broker must not wait. If it cannot be sent, the connection broke.
func (s *session) mustDeliver(m Message) {
	if !s.deliver(m) {
		s.Lose()
	}
}

func (s *session) ready() Message {
	m := Message{Kind: KindReady, Service: []byte(s.Name)}
	if s.Cancel {
		m.Body = framesOf([]string{cancels})
	}
	return m
}

// Receive takes a message of the broker.
func (s *session) Receive(frames [][]byte) {
	if s.over != nil {
		return
	}
	m, err := Parse(frames)
	if err == nil && m.Kind == KindRequest && s.busy() {
		err = errors.New("a REQUEST before the reply to the last one")
	}
	if err == nil && (m.Dialect.ofClient() || m.Kind == KindReady || m.Kind == KindPartial || m.Kind == KindReply) {
		err = fmt.Errorf("an unexpected %v", m.Kind)
	}
	if err == nil && m.Kind == KindCredit {
		err = s.addCredit(m)
	}
	if err != nil {
		if !s.complained {
			s.complained = true
			s.log.Error("bad message", "why", err)
		}
		return
	}

	s.silence = 0
	s.finished = s.finished && m.Kind == KindDisconnect
	switch m.Kind {
	case KindRequest:
		s.request, s.address = &m, m.Client
		s.credit, s.streams = creditOf(m.Client)
	case KindHeartbeat:
		if !s.reserved.IsZero() && s.request == nil { // The broker has no request.
			s.release()
		}
	case KindDisconnect:
		s.end(s.disconnected(m))
	}
}

// maxCredit is the most credit that a session uses: ZeroMQ takes 1000 messages until the broker reads them.
const maxCredit = 500

// creditOf returns how many partial replies a client takes at first, if its address is a token of bbroker that
// says so: RUN.COUNT~N, and perhaps @NAME.
func creditOf(address [][]byte) (credit int, ok bool) {
	if len(address) != 1 {
		return 0, false
	}
	token, _, _ := strings.Cut(string(address[0]), "@")
	run, rest, _ := strings.Cut(token, ".")
	count, number, _ := strings.Cut(rest, "~")
	credit, ok = parseCredit(number)
	ok = ok && len(run) == 8 && strings.Trim(run, "0123456789abcdef") == "" &&
		count != "" && strings.Trim(count, "0123456789") == "" && number[0] != '0'
	return credit, ok
}

// parseCredit returns a number of messages, but no more than maxCredit.
func parseCredit(digits string) (credit int, ok bool) {
	n, err := strconv.ParseUint(digits, 10, 64)
	return int(min(n, maxCredit)), err == nil || errors.Is(err, strconv.ErrRange)
}

// addCredit takes CREDIT. It may come late, for another request than the one in hand.
func (s *session) addCredit(m Message) error {
	if len(m.Body) != 1 {
		return fmt.Errorf("a CREDIT with %d numbers", len(m.Body))
	}
	n, ok := parseCredit(string(m.Body[0]))
	if !ok {
		return fmt.Errorf("a CREDIT of %.20q", m.Body[0])
	}
	if s.streams && s.busy() && slices.EqualFunc(m.Client, s.address, bytes.Equal) {
		s.credit = min(s.credit+n, maxCredit)
	}
	return nil
}

// disconnected returns why the broker sent DISCONNECT: bbroker tells a service that its key may not serve
// the name, or that nobody awaits a reply which the service would rather not work for then.
func (s *session) disconnected(m Message) error {
	if why, ok := m.because(notAllowed); ok {
		return &failure{status: exitNotAllowed, err: errors.New(printable(why)), hint: mayServeHint}
	}
	if s.cancels() || (s.request != nil || s.finished) && (s.streams || s.Cancel) {
		return errUnwanted
	}
	return errors.New("the broker sent DISCONNECT")
}

// errUnwanted is why a session ends if its request was cancelled.
var errUnwanted = errors.New("nobody awaits the reply any more")

// cancels tells whether a command runs that ends with the session.
func (s *session) cancels() bool { return s.working && (s.streams || s.Cancel) }

// Start starts to work on a request that has come, if there is one, or hands it back. Call it when all that
// has come was received: behind the request there may be a DISCONNECT.
func (s *session) Start(now time.Time) {
	if s.request == nil || s.over != nil || s.stoodStill(now) {
		return
	}
	m := s.request
	s.request = nil
	if s.slot == nil && s.place == nil {
		s.slot, s.place = s.Slots.take(s.Broker.endpoint, s.wake)
	}
	if s.slot == nil {
		s.requestLog.Debug("request handed back", "request", tokenOf(m.Client))
		s.mustDeliver(Message{Kind: KindDisconnect, Body: framesOf([]string{handedBack, "all jobs are busy"})})
		return
	}
	if !s.reserved.IsZero() {
		s.Slots.answered(s.Broker.endpoint)
	}
	s.working, s.reserved = true, time.Time{}
	r := Request{Broker: s.Broker, Token: tokenOf(m.Client), Body: m.Body}
	r.Context, s.cancel = context.WithCancelCause(context.Background())
	if s.streams {
		s.stream = newStream(s.wake)
		r.Stream = s.stream
	}
	s.start(s.slot, r)
}

// Claim registers anew when the session need not wait any more. If it was given a slot, it keeps it until the
// broker has sent a request, or a heartbeat because it has none.
func (s *session) Claim(now time.Time) {
	if s.place == nil {
		return
	}
	select {
	case s.slot = <-s.place.slot:
	default:
		return
	}
	s.place = nil
	if s.slot != nil {
		s.reserved = now.Add(reservation)
	}
	s.mustDeliver(s.ready())
}

// reservation is how long a session keeps a slot for a broker that answers READY with nothing. Others wait
// meanwhile.
const reservation = 500 * time.Millisecond

// release gives up the slot of the session, or its place, unless a command runs.
func (s *session) release() {
	switch {
	case s.working:
		return
	case s.place != nil:
		s.Slots.leave(s.place)
	case !s.reserved.IsZero():
		s.Slots.unanswered(s.Broker.endpoint, s.slot)
	case s.slot != nil:
		s.Slots.put(s.slot)
	}
	s.slot, s.place, s.reserved = nil, nil, time.Time{}
}

// stoodStill ends the session if this process did not run for so long that the broker has given it up:
// the clients of requests that still come were told.
func (s *session) stoodStill(now time.Time) bool {
	late := now.Sub(s.due)
	if late <= s.silenceLimit() {
		return false
	}
	s.end(fmt.Errorf("this process stood still for %v", late.Round(time.Second)))
	s.deliver(Message{Kind: KindDisconnect})
	return true
}

// tokenOf returns a printable word for the address that a broker gave a request.
func tokenOf(address [][]byte) string {
	quoted := strconv.QuoteToASCII(string(bytes.Join(address, []byte{'/'})))
	return quoted[1 : len(quoted)-1]
}

// Finish takes the body of the reply to the request in hand.
func (s *session) Finish(body [][]byte) {
	s.finished = true
	cancelled := s.over != nil && s.cancels()
	s.working, s.silence, s.stream = false, 0, nil
	if !cancelled {
		s.reply = &Message{Dialect: s.dialect(), Kind: KindReply, Client: s.address, Body: body}
	}
	if s.over != nil {
		s.dropReply(s.over)
	} else {
		s.Flush()
	}
	s.release()
}

// dialect returns that of the reply to the request in hand.
func (s *session) dialect() Dialect {
	if s.streams {
		return worker02
	}
	return worker01
}

// Tick does what is due and returns the time of the next call, zero for never.
func (s *session) Tick(now time.Time) time.Time {
	if !s.reserved.IsZero() && !now.Before(s.reserved) {
		s.release()
	}
	partDue := s.sendParts(now)
	return earlier(earlier(s.beat(now), s.reserved), partDue)
}

// sendParts sends what a stream has, as far as there is credit, and returns when more is due.
func (s *session) sendParts(now time.Time) (due time.Time) {
	for s.over == nil && s.stream != nil && s.credit > 0 {
		body, due := s.stream.take(now)
		if body == nil {
			return due
		}
		s.credit--
		s.mustDeliver(Message{Dialect: s.dialect(), Kind: KindPartial, Client: s.address, Body: body})
	}
	return time.Time{}
}

// beat sends the heartbeats and returns when the next one is due, zero for never.
func (s *session) beat(now time.Time) time.Time {
	if s.over != nil {
		return time.Time{}
	}
	if now.Before(s.due) {
		return s.due
	}
	if s.registered && !s.busy() && s.stoodStill(now) {
		return time.Time{}
	}
	s.due = now.Add(s.Heartbeat)
	if !s.registered {
		if s.noticeMissing(now, errMissing) {
			s.end(errMissing) // The name of its host may have another address by now.
		}
		return s.due
	}
	s.deliver(Message{Kind: KindHeartbeat})
	if s.working && !s.streams {
		return s.due
	}
	if s.silence++; s.silence > 1 {
		// A heartbeat waits behind a long frame. Bytes that arrive are a sign of life as well.
		if n := s.received(); n != s.heard {
			s.heard, s.silence = n, 1
		}
	}
	if s.silence > s.Liveness {
		s.end(fmt.Errorf("the broker was silent for %d heartbeats", s.Liveness))
	}
	return s.due
}

// end ends the session. A reply that was not sent never will be. A command that runs keeps its slot.
func (s *session) end(why error) {
	s.over = why
	if s.cancels() {
		s.cancel(why)
	}
	if s.stream != nil {
		s.stream.close()
	}
	s.dropReply(why)
	s.release()
}

// errMissing is why a session ends if no broker was there for a while.
var errMissing = errors.New("no broker is there")

// Lose is called when the connection broke. What was on its way is lost in both directions: an idle
// worker might wait for a request that the broker has sent, and a stream would have a hole.
func (s *session) Lose() {
	if s.over == nil && s.registered && (!s.busy() || s.streams) {
		s.end(errors.New("the connection to the broker broke"))
	}
}

// busy tells whether a request is in hand. Meanwhile a broken connection does not end the session, except for
// a stream: the reply can still go out over the next one. Nor does silence while a command runs: some brokers
// send no heartbeats to a busy worker.
func (s *session) busy() bool {
	return s.request != nil || s.working || s.reply != nil
}

// Leave sends DISCONNECT.
func (s *session) Leave() {
	s.release()
	s.dropReply(errors.New("the broker is gone"))
	if s.registered {
		s.deliver(Message{Kind: KindDisconnect})
	}
}

// dropReply logs that a reply, if there is one, cannot be sent any more.
func (s *session) dropReply(why error) {
	if s.reply != nil {
		s.requestLog.Error("reply dropped", "request", tokenOf(s.reply.Client), "why", why)
		s.reply = nil
	}
}
