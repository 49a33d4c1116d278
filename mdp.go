package main

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// The protocol: MDP/0.1 (RFC 7), with the address stacks of Dispatchr Backbone, and MDP/0.2 (RFC 18), which
// adds partial replies. Every element is one frame, and a frame is any bytes.
//
//	MDP/0.1 = address '' ( 'MDPC01' call / 'MDPW01' command )
//	MDP/0.2 = address    ( 'MDPC02' command / 'MDPW02' command )     ; '' before the name is accepted
//	address = *frame                                                 ; none of them empty
//
//	                MDPC01   MDPC02   MDPW01   MDPW02   followed by
//	READY                             %x01     %x01     service [ 'cancel' ]     worker -> broker
//	REQUEST         none     %x01                       service *body            client -> broker
//	                                  %x02     %x02     client '' *body          broker -> worker
//	PARTIAL                  %x02                       service *body            broker -> client
//	                                           %x03     client '' *body          worker -> broker
//	REPLY (FINAL)   none     %x03                       service *body            broker -> client
//	                                  %x03     %x04     client '' *body          worker -> broker
//	HEARTBEAT                         %x04     %x05                              both ways
//	DISCONNECT                        %x05     %x06     [ status reason ]        both ways
//	CREDIT                                     %x07     client '' number         broker -> worker
//
// A ROUTER puts the identity of the peer at the head of the address of a message that it receives, and
// takes it off one that it sends; at a DEALER the address is usually empty. client is the address that the
// broker gave the worker with the request.
//
// What is ours is between bbroker, bservice and brequest, and those that show that they know it:
//
//   - DISCONNECT with 77: bbroker tells bservice what it may not do. With 75, bservice gives its request back
//     to bbroker, because the commands of other brokers take all of its jobs. It stays registered, with
//     heartbeats both ways, but gets no request until it sends READY again. bbroker answers that with a
//     request, or else a heartbeat.
//   - 'cancel' after READY: when nobody awaits the reply to the worker's request any more, it gets DISCONNECT,
//     and ends the command. So does one that sends a stream.
//   - CREDIT, and mmi.credit from the client: how many more PARTIALs a stream may have on their way.
//   - The token of a request, which bbroker sends in place of the client's address: see nextToken.

// A Dialect is how a peer spells messages. The zero value is that of a worker of MDP/0.1.
type Dialect uint8

const (
	worker01 Dialect = iota
	client01
	worker02
	client02
	worker02Delimited // with an empty frame before the name, as in MDP/0.1
	client02Delimited
)

// Kind says what a message is.
type Kind uint8

const (
	KindReady Kind = iota + 1
	KindRequest
	KindPartial
	KindReply // the last one, which MDP/0.2 calls FINAL
	KindHeartbeat
	KindDisconnect
	KindCredit
)

var kindNames = [...]string{KindReady: "READY", KindRequest: "REQUEST", KindPartial: "PARTIAL", KindReply: "REPLY",
	KindHeartbeat: "HEARTBEAT", KindDisconnect: "DISCONNECT", KindCredit: "CREDIT"}

func (k Kind) String() string { return kindNames[k] }

// The kinds of messages by their command byte.
var (
	workerCommands01 = []Kind{1: KindReady, KindRequest, KindReply, KindHeartbeat, KindDisconnect}
	workerCommands02 = []Kind{1: KindReady, KindRequest, KindPartial, KindReply, KindHeartbeat, KindDisconnect, KindCredit}
	clientCommands02 = []Kind{1: KindRequest, KindPartial, KindReply}
)

// dialects has the grammar of each dialect.
var dialects = [...]struct {
	name      []byte // of the protocol, as a frame
	delimited bool   // an empty frame stands before it
	ofClient  bool
	commands  []Kind // nil if messages have no command byte
}{
	worker01:          {[]byte("MDPW01"), true, false, workerCommands01},
	client01:          {[]byte("MDPC01"), true, true, nil},
	worker02:          {[]byte("MDPW02"), false, false, workerCommands02},
	client02:          {[]byte("MDPC02"), false, true, clientCommands02},
	worker02Delimited: {[]byte("MDPW02"), true, false, workerCommands02},
	client02Delimited: {[]byte("MDPC02"), true, true, clientCommands02},
}

// ofClient tells whether messages are from or for a client, rather than a worker.
func (d Dialect) ofClient() bool { return dialects[d].ofClient }

// hasPartials tells whether a peer knows partial replies.
func (d Dialect) hasPartials() bool { return d >= worker02 }

// dialectOf returns the dialect with a name.
func dialectOf(name []byte, delimited bool) (d Dialect, ok bool) {
	for d, grammar := range dialects {
		if grammar.delimited == delimited && string(grammar.name) == string(name) {
			return Dialect(d), true
		}
	}
	return 0, false
}

// Message is a parsed MDP message. Besides Dialect, Address and Kind,
//
//	a client's message has                       Service, Body
//	READY has                                    Service, Body
//	REQUEST, PARTIAL, REPLY and CREDIT have      Client, Body
//	DISCONNECT has                               Body
type Message struct {
	Dialect Dialect
	Address [][]byte // of the peer that it is from or for
	Kind    Kind
	Service []byte
	Client  [][]byte // given to a worker with a request, and returned with the reply
	Body    [][]byte
}

var (
	errNoProtocol = errors.New("no frame MDPC01, MDPW01, MDPC02 or MDPW02 behind the address")
	errNoCommand  = errors.New("no one-byte command")
	errNoService  = errors.New("no service name")
	errLongName   = fmt.Errorf("a service name of more than %d bytes", maxName)
	errNoClient   = errors.New("no empty frame after the client's address")
)

// The first of the two frames that tell why a peer sends DISCONNECT.
const (
	handedBack = "75"
	notAllowed = "77"
)

// cancels follows the service in the READY of a worker that ends its command if nobody awaits the reply.
const cancels = "cancel"

const (
	maxName     = 255 // bytes of a service's name
	maxIdentity = 255 // bytes of a peer's identity (RFC 23), which ZeroMQ does not check
)

// Parse parses the frames of a message without copying them. An error says what is wrong with the
// frames, in words for a log. A client's message of MDP/0.1 does not tell whether it is a request or a
// reply: it is parsed as a request.
//
// Three deviations of real peers are accepted because their meaning is clear: no empty frame before the
// name of MDP/0.1 (the DISCONNECT of Dispatchr Backbone's broker), one before that of MDP/0.2 (a REQ
// socket), and frames after a command that takes none (the DISCONNECT of its Node.js service).
func Parse(frames [][]byte) (Message, error) {
	dialect, address, rest, ok := cutAtProtocol(frames)
	if !ok {
		return Message{}, errNoProtocol
	}
	m := Message{Dialect: dialect, Address: address, Kind: KindRequest}
	if commands := dialects[dialect].commands; commands != nil {
		if len(rest) == 0 || len(rest[0]) != 1 {
			return m, fmt.Errorf("%w after %s", errNoCommand, dialects[dialect].name)
		}
		command := int(rest[0][0])
		if command == 0 || command >= len(commands) {
			return m, fmt.Errorf("unknown command 0x%02x of %s", command, dialects[dialect].name)
		}
		m.Kind, rest = commands[command], rest[1:]
	}

	switch {
	case dialect.ofClient(), m.Kind == KindReady:
		if len(rest) == 0 || len(rest[0]) == 0 {
			return m, fmt.Errorf("%v: %w", m.Kind, errNoService)
		}
		if len(rest[0]) > maxName {
			return m, fmt.Errorf("%v: %w", m.Kind, errLongName)
		}
		m.Service, m.Body = rest[0], rest[1:]
	case m.Kind == KindHeartbeat:
	case m.Kind == KindDisconnect:
		m.Body = rest
	default:
		if m.Client, m.Body, ok = cutAtEmpty(rest); !ok { // m.Client is all that follows then
			return m, fmt.Errorf("%v: %w", m.Kind, errNoClient)
		}
	}
	return m, nil
}

// afterCommand returns all frames of a message of MDP/0.2 behind its command.
func (m Message) afterCommand(frames [][]byte) [][]byte {
	command := len(m.Address) + 1
	if dialects[m.Dialect].delimited {
		command++
	}
	return frames[command+1:]
}

// cutAtProtocol splits a message around the name of its protocol. The address ends before the first empty
// frame, or before a name of MDP/0.2.
func cutAtProtocol(frames [][]byte) (d Dialect, address, rest [][]byte, ok bool) {
	for i, frame := range frames {
		if len(frame) == 0 {
			if i+1 < len(frames) {
				if d, ok = dialectOf(frames[i+1], true); ok {
					return d, frames[:i], frames[i+2:], true
				}
			}
			break
		}
		if d, ok = dialectOf(frame, false); ok {
			return d, frames[:i], frames[i+1:], true
		}
	}
	for i, frame := range frames { // without the empty frame
		if d, ok = dialectOf(frame, true); ok {
			return d, frames[:i], frames[i+1:], true
		}
		if len(frame) == 0 {
			break
		}
	}
	return 0, nil, nil, false
}

// because returns the reason of a DISCONNECT with a status. Peers of others may send frames that mean nothing.
func (m Message) because(status string) (reason string, ok bool) {
	if m.Kind != KindDisconnect || len(m.Body) != 2 || string(m.Body[0]) != status {
		return "", false
	}
	return string(m.Body[1]), true
}

// commandBytes has a frame for each command byte. They are shared, and must not be written to.
var commandBytes = []byte{0, 1, 2, 3, 4, 5, 6, 7}

// Frames returns the frames of the message. It is the inverse of Parse.
func (m Message) Frames() [][]byte {
	grammar := &dialects[m.Dialect]
	frames := make([][]byte, 0, len(m.Address)+len(m.Client)+len(m.Body)+4)
	frames = append(frames, m.Address...)
	if grammar.delimited {
		frames = append(frames, nil)
	}
	frames = append(frames, grammar.name)
	if grammar.commands != nil {
		command := slices.Index(grammar.commands, m.Kind)
		frames = append(frames, commandBytes[command:command+1])
	}
	switch {
	case grammar.ofClient, m.Kind == KindReady:
		frames = append(frames, m.Service)
	case m.Kind != KindHeartbeat && m.Kind != KindDisconnect:
		frames = append(frames, m.Client...)
		frames = append(frames, nil)
	}
	return append(frames, m.Body...)
}

// cutAtEmpty splits frames around the first empty one, as bytes.Cut does.
func cutAtEmpty(frames [][]byte) (before, after [][]byte, ok bool) {
	i := slices.IndexFunc(frames, func(f []byte) bool { return len(f) == 0 })
	if i < 0 {
		return frames, nil, false
	}
	return frames[:i], frames[i+1:], true
}

// The services of the broker itself (RFC 8, MMI). Names with this prefix are reserved.
const (
	mmiPrefix   = "mmi."
	mmiService  = "mmi.service"  // body: a service name; reply: found or not found
	mmiServices = "mmi.services" // reply: a table of the services, which begins with servicesHeader
	mmiMetrics  = "mmi.metrics"  // reply: Prometheus' text format
	mmiCancel   = "mmi.cancel"   // gives up requests of the client, as far as they can be; reply: found or not found
	mmiCredit   = "mmi.credit"   // body: how many more PARTIALs the client takes; reply: found or not found

	mmiFound          = "200"
	mmiBadRequest     = "400"
	mmiNotFound       = "404"
	mmiNotImplemented = "501"
)

// servicesHeader begins the reply of our broker to mmi.services.
const servicesHeader = "service\tworkers\tidle\twaiting\tin flight\tserved\tfailed\n"

// emptyBody is the body of a request to the broker itself that needs none. Some brokers die of a
// request without a body.
var emptyBody = [][]byte{{}}

// shuttingDown is the reason of a broker that refuses requests because it is about to stop.
const shuttingDown = "the broker is shutting down"

// isManagement tells whether a name is one of the broker's own services.
func isManagement(name string) bool { return strings.HasPrefix(name, mmiPrefix) }

// A Reply is the outcome of a request, as that of a command.
type Reply struct {
	Output [][]byte // standard output in one frame; services of others may send any number
	Stderr []byte
	Status int // exit status

	// FromBroker marks a failure of the broker itself, for which no command ended. If its status is
	// 75, no command has begun either.
	FromBroker bool

	// Reason is why a service ended a command or ran none. It is for the log; the client reads it in Stderr.
	Reason error
}

const statusPrefix = "exit status "

// Body returns the frames of the reply. Success without standard error is the output alone.
// Anything else is a status reply of exactly three frames: standard output, standard error
// and "exit status N". A failure of the broker itself has a zero in front of N, which other clients
// do not notice.
func (r Reply) Body() [][]byte {
	if r.Status == 0 && len(r.Stderr) == 0 {
		return r.Output
	}
	var stdout []byte
	if len(r.Output) == 1 {
		stdout = r.Output[0] // without a copy: it may be long
	} else {
		stdout = bytes.Join(r.Output, nil)
	}
	prefix := statusPrefix
	if r.FromBroker {
		prefix += "0"
	}
	return [][]byte{stdout, r.Stderr, []byte(prefix + strconv.Itoa(r.Status))}
}

// ParseReply is the inverse of Body. It also recognizes how the services of Dispatchr
// Backbone report a failure, with the two frames "Error" and a message. Any other body is the
// output of a success.
func ParseReply(body [][]byte) Reply {
	switch {
	case len(body) == 3:
		digits, ok := strings.CutPrefix(string(body[2]), statusPrefix)
		status, err := strconv.ParseUint(digits, 10, 8)
		if ok && err == nil {
			return Reply{Output: body[:1], Stderr: body[1], Status: int(status), FromBroker: status > 0 && digits[0] == '0'}
		}
	case len(body) == 2 && string(body[0]) == "Error":
		return Reply{Stderr: fmt.Appendf(nil, "%s\n", body[1]), Status: 1}
	}
	return Reply{Output: body}
}

// framesOf returns a frame for each text.
func framesOf(texts []string) [][]byte {
	frames := make([][]byte, len(texts))
	for i, text := range texts {
		frames[i] = []byte(text)
	}
	return frames
}

// keep copies the frames of a message that a socket may only have lent, the long ones, in their place.
func keep(frames [][]byte) {
	for i, frame := range frames {
		if len(frame) >= maxJoined {
			frames[i] = bytes.Clone(frame)
		}
	}
}

// costOf returns the bytes that holding the frames takes, roughly: each frame has a header.
func costOf(frames [][]byte) size { return sizeOf(frames) + frameCost*size(len(frames)) }

const frameCost = 64

// sizeOf returns the number of bytes in the frames.
func sizeOf(frames [][]byte) size {
	n := 0
	for _, frame := range frames {
		n += len(frame)
	}
	return size(n)
}
