package main

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// The protocol: MDP/0.1 (RFC 7), with the address stacks of Dispatchr Backbone.
//
//	message    = address '' ( client / worker )
//	address    = *frame                             ; none of them empty
//	client     = 'MDPC01' service *body             ; a request, or the reply to it
//	worker     = 'MDPW01' ( ready / request / reply / heartbeat / disconnect )
//	ready      = %x01 service                       ; worker -> broker
//	request    = %x02 address '' *body              ; broker -> worker
//	reply      = %x03 address '' *body              ; worker -> broker
//	heartbeat  = %x04                               ; both ways
//	disconnect = %x05 [ ( '75' / '77' ) reason ]    ; both ways
//
// With 77, bbroker tells bservice what it may not do. With 75, bservice gives its request back to bbroker,
// because the commands of other brokers take all of its jobs. It stays registered, with heartbeats both ways,
// but gets no request until it sends READY again. bbroker answers that with a request, or else a heartbeat.
//
// Every element is one frame, and a frame is any bytes. A ROUTER puts the identity of the peer at
// the head of the address of a message that it receives, and takes it off one that it sends; at a
// DEALER the address is usually empty.
const (
	clientProtocol = "MDPC01"
	workerProtocol = "MDPW01"
)

// Kind says what a message is. That of a worker's message is its command byte (RFC 7,
// "MDP/Worker"); a client's message has none.
type Kind int16

const (
	KindClient     Kind = -1
	KindReady      Kind = 0x01
	KindRequest    Kind = 0x02
	KindReply      Kind = 0x03
	KindHeartbeat  Kind = 0x04
	KindDisconnect Kind = 0x05
)

var commandNames = [...]string{KindReady: "READY", KindRequest: "REQUEST", KindReply: "REPLY", KindHeartbeat: "HEARTBEAT", KindDisconnect: "DISCONNECT"}

func (k Kind) String() string {
	switch {
	case k == KindClient:
		return clientProtocol
	case k > 0 && int(k) < len(commandNames):
		return commandNames[k]
	}
	return fmt.Sprintf("command 0x%02x", int16(k))
}

// Message is a parsed MDP message. Besides Address and Kind,
//
//	a client's message has   Service, Body
//	READY has                Service
//	REQUEST and REPLY have   Client, Body
type Message struct {
	Address [][]byte // of the peer that it is from or for
	Kind    Kind
	Service []byte
	Client  [][]byte // given to a worker with a request, and returned with the reply
	Body    [][]byte
}

var (
	errNoProtocol = errors.New("no MDPC01 or MDPW01 frame after an empty frame")
	errNoCommand  = errors.New("no one-byte command after MDPW01")
	errNoService  = errors.New("no service name")
	errLongName   = fmt.Errorf("a service name of more than %d bytes", maxName)
	errNoClient   = errors.New("no empty frame after the client's address")
)

// The first of the two frames that tell why a peer sends DISCONNECT.
const (
	handedBack = "75"
	notAllowed = "77"
)

const (
	maxName     = 255 // bytes of a service's name
	maxIdentity = 255 // bytes of a peer's identity (RFC 23), which ZeroMQ does not check
)

// Parse parses the frames of a message without copying them. An error says what is wrong with the
// frames, in words for a log.
//
// Two deviations of real peers are accepted because their meaning is clear: no empty frame before
// the protocol (the DISCONNECT of Dispatchr Backbone's broker), and frames after a command that
// takes none (the DISCONNECT of its Node.js service).
func Parse(frames [][]byte) (Message, error) {
	address, rest, _ := cutAtEmpty(frames)
	if len(rest) == 0 || !isProtocol(rest[0]) {
		i := slices.IndexFunc(address, isProtocol)
		if i < 0 {
			return Message{}, errNoProtocol
		}
		address, rest = frames[:i], frames[i:]
	}

	m := Message{Address: address, Kind: KindClient}
	protocol, rest := rest[0], rest[1:]
	if string(protocol) == workerProtocol {
		if len(rest) == 0 || len(rest[0]) != 1 {
			return m, errNoCommand
		}
		m.Kind, rest = Kind(rest[0][0]), rest[1:]
	}

	switch m.Kind {
	case KindClient, KindReady:
		if len(rest) == 0 || len(rest[0]) == 0 {
			return m, fmt.Errorf("%v: %w", m.Kind, errNoService)
		}
		if len(rest[0]) > maxName {
			return m, fmt.Errorf("%v: %w", m.Kind, errLongName)
		}
		m.Service = rest[0]
		if m.Kind == KindClient {
			m.Body = rest[1:]
		}
	case KindRequest, KindReply:
		var ok bool
		if m.Client, m.Body, ok = cutAtEmpty(rest); !ok { // m.Client is all that follows then
			return m, fmt.Errorf("%v: %w", m.Kind, errNoClient)
		}
	case KindDisconnect:
		m.Body = rest
	case KindHeartbeat:
	default:
		return m, fmt.Errorf("unknown %v", m.Kind)
	}
	return m, nil
}

// because returns the reason of a DISCONNECT with a status. Peers of others may send frames that mean nothing.
func (m Message) because(status string) (reason string, ok bool) {
	if m.Kind != KindDisconnect || len(m.Body) != 2 || string(m.Body[0]) != status {
		return "", false
	}
	return string(m.Body[1]), true
}

// Frames that messages share. They must not be written to.
var (
	clientFrame   = []byte(clientProtocol)
	workerFrame   = []byte(workerProtocol)
	commandFrames = []byte{0, byte(KindReady), byte(KindRequest), byte(KindReply), byte(KindHeartbeat), byte(KindDisconnect)}
)

// Frames returns the frames of the message. It is the inverse of Parse.
func (m Message) Frames() [][]byte {
	frames := make([][]byte, 0, len(m.Address)+len(m.Client)+len(m.Body)+4)
	frames = append(frames, m.Address...)
	frames = append(frames, nil)
	if m.Kind == KindClient {
		frames = append(frames, clientFrame)
	} else {
		frames = append(frames, workerFrame, commandFrames[m.Kind:m.Kind+1])
	}
	switch m.Kind {
	case KindClient, KindReady:
		frames = append(frames, m.Service)
	case KindRequest, KindReply:
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

func isProtocol(frame []byte) bool {
	return string(frame) == clientProtocol || string(frame) == workerProtocol
}

// The services of the broker itself (RFC 8, MMI). Names with this prefix are reserved.
const (
	mmiPrefix   = "mmi."
	mmiService  = "mmi.service"  // body: a service name; reply: found or not found
	mmiServices = "mmi.services" // reply: a table of the services, which begins with servicesHeader
	mmiMetrics  = "mmi.metrics"  // reply: Prometheus' text format
	mmiCancel   = "mmi.cancel"   // drops the waiting requests of the client; reply: found or not found

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
