package main

import (
	"fmt"
	"strconv"
	"time"
)

// A callStream is what a call has besides if it takes partial replies (RFC 18).
type callStream struct {
	take func(part Reply) // called for each part, in order

	dialect   Dialect // of the request as it was sent
	parts     int     // received
	unwritten int     // of them
	cost      size    // of those

	// Some brokers leave the name of the service out. The first message for the call tells.
	named, unnamed bool

	// credited tells that the broker takes mmi.credit for the call. One is unanswered at most: granting.
	credited, granting bool
	begun              bool // the broker was told that the client grants
	owed               int  // parts that were written and not granted
}

// maxUnwritten is how much of a reply may wait for a slow reader, in bytes, before the rest stays in the
// connection. It is twice what the credit of bbroker allows.
const maxUnwritten = 8 << 20

// cost returns the bytes that holding the reply takes, roughly.
func (r Reply) cost() size { return costOf(r.Output) + size(len(r.Stderr)) + frameCost }

// support is what a caller knows of its broker: whether it sends partial replies.
type support uint8

const (
	supportUnknown support = iota
	supportAsked01         // the broker was asked in MDP/0.1
	supportUnasked02
	supportAsked02 // it did not answer that, and was asked in MDP/0.2
	supportNone
	supportPartials // but it knows no credit, as RFC 18 has none
	supportCredit
)

// asking tells whether an answer of the broker is awaited.
func (s support) asking() bool { return supportUnknown < s && s < supportNone }

// supportPatience is how long a broker may take to answer, each time. Some do not.
const supportPatience = 250 * time.Millisecond

// ask asks the broker whether it sends partial replies, before the first call that takes them. It tells
// whether the connection takes no message for now.
func (r *caller) ask(now time.Time) (blocked bool) {
	k, c := r.conn, r.waiting[0]
	if k.support == supportUnknown || k.support == supportUnasked02 {
		dialect := client01
		if k.support == supportUnasked02 {
			dialect = client02
		}
		switch r.sendIn(dialect, mmiService, framesOf([]string{mmiCredit}), "") {
		case nil:
			k.asked, k.answerDue = true, time.Time{}
			k.support++
		case errWouldBlock:
			return true
		default:
			r.conn = nil // It broke within the message.
			return false
		}
	}
	if k.support.asking() && k.connected && k.answerDue.IsZero() {
		patience := supportPatience
		if !c.due.IsZero() { // More than half of its time is for the reply.
			patience = min(patience, c.due.Sub(now)/4)
		}
		k.answerDue = now.Add(patience)
	}
	return false
}

// takeAnswer tells whether a message answers that question, or one of the search for a broker.
func (r *caller) takeAnswer(m Message) bool {
	k := r.conn
	if len(m.Address) > 0 || !m.Dialect.ofClient() {
		return false
	}
	named := string(m.Service) == mmiService
	code := ""
	if named {
		code = serviceCode(ParseReply(m.Body))
	}
	switch {
	case !k.support.asking() || !named && !m.Dialect.hasPartials():
		late := named && (r.several || k.asked)
		return late && !r.asks(mmiService)
	case code == mmiFound:
		k.support = supportCredit
	case m.Dialect.hasPartials():
		k.support = supportPartials
	default:
		k.support = supportNone
	}
	k.answerDue = time.Time{}
	return true
}

// doubt is called when the broker has not answered in time.
func (r *caller) doubt(now time.Time) {
	if k := r.conn; k != nil && !k.answerDue.IsZero() && !now.Before(k.answerDue) {
		k.answerDue = time.Time{}
		k.support++
	}
}

// streamDialect returns the dialect for requests that take partial replies, and to take them back.
func (k *connection) streamDialect() Dialect {
	if k.support >= supportPartials {
		return client02
	}
	return client01
}

// dialectFor returns the dialect for a call.
func (r *caller) dialectFor(c *call) Dialect {
	if c.stream == nil {
		return client01
	}
	return r.conn.streamDialect()
}

// reset is called when the request was sent.
func (s *callStream) reset(k *connection) {
	*s = callStream{take: s.take, dialect: k.streamDialect(), credited: k.support == supportCredit}
}

// complete returns a message of MDP/0.2 with the name of its service, which the brokers of others may leave
// out.
func (r *caller) complete(m Message, frames [][]byte, err error) (Message, error) {
	c := r.conn.inFlight[r.correlationOf(m)]
	isReply := m.Dialect.ofClient() && m.Dialect.hasPartials() && (m.Kind == KindPartial || m.Kind == KindReply)
	if !isReply || r.conn.support != supportPartials || c == nil || c.stream == nil || c.stream.named {
		return m, err
	}
	service := string(m.Service)
	if err == nil && !c.stream.unnamed && (service == c.service || service == mmiCancel && r.conn.cancels > 0) {
		c.stream.named = service == c.service
		return m, nil
	}
	c.stream.unnamed = true
	m.Service, m.Body = []byte(c.service), m.afterCommand(frames)
	return m, nil
}

// takePart takes a partial reply. From now on the request is not sent again.
func (r *caller) takePart(c *call, part Reply) {
	s := c.stream
	s.parts++
	s.unwritten++
	s.cost += part.cost()
	if s.parts == 1 {
		c.retries, c.patient, c.mobile = 0, false, false
		c.release()
	}
	c.due = time.Time{} // Until it is written, the silence is that of the reader.
	s.take(part)
}

// written is called when parts of a call were written.
func (r *caller) written(c *call, parts []Reply, now time.Time) {
	s := c.stream
	if len(parts) == 0 || r.conn == nil || r.conn.inFlight[c.correlation] != c {
		return
	}
	s.unwritten -= len(parts)
	s.owed += len(parts)
	for _, part := range parts {
		s.cost -= part.cost()
	}
	if s.unwritten == 0 {
		c.startTimeout(now)
		r.due = earlier(r.due, c.due)
	}
}

// full tells whether so much is unwritten that the loop must not receive more.
func (r *caller) full() bool {
	if r.conn == nil || r.conn.support < supportPartials {
		return false
	}
	for _, c := range r.conn.inFlight {
		if c.stream != nil && c.stream.cost >= maxUnwritten {
			return true
		}
	}
	return false
}

// grant lets the broker send as many more parts as were written. It tells whether the connection takes no
// message for now.
func (r *caller) grant() (blocked bool) {
	if r.conn == nil || r.conn.support != supportCredit {
		return false
	}
	for _, c := range r.conn.inFlight {
		s := c.stream
		if s == nil || !s.credited || s.granting || s.begun && s.owed == 0 {
			continue
		}
		switch r.sendIn(s.dialect, mmiCredit, framesOf([]string{strconv.Itoa(s.owed)}), c.correlation) {
		case nil:
			s.begun, s.granting, s.owed = true, true, 0
		case errWouldBlock:
			return true
		default:
			return false
		}
	}
	return false
}

// creditAnswered takes the answer to mmi.credit. Without correlation the first ones may be for calls that
// have ended.
func (r *caller) creditAnswered(c *call, body [][]byte) {
	switch {
	case !r.correlated && r.conn.lateAnswers > 0:
		r.conn.lateAnswers--
	case c != nil && c.stream != nil && c.stream.granting:
		c.stream.granting = false
		c.stream.credited = len(body) == 1 && string(body[0]) == mmiFound
	}
}

// silence returns the error of a call whose timeout is over.
func (c *call) silence(endpoint string) error {
	err := fmt.Errorf("%w from %s within %v", errTimeout, endpoint, c.timeout)
	if c.stream != nil && c.stream.parts > 0 {
		return fmt.Errorf("%w of its last output", err)
	}
	return err
}
