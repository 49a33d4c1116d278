package main

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// The wire: MDP/0.1 (RFC 7), with the address stacks of Dispatchr Backbone.
//
//	message    = address '' ( client / worker )
//	address    = *frame                             ; none of them empty
//	client     = 'MDPC01' service *body             ; a request, or the reply to it
//	worker     = 'MDPW01' ( ready / request / reply / heartbeat / disconnect )
//	ready      = %x01 service                       ; worker -> broker
//	request    = %x02 address '' *body              ; broker -> worker
//	reply      = %x03 address '' *body              ; worker -> broker
//	heartbeat  = %x04                               ; both ways
//	disconnect = %x05                               ; both ways
//
// Every element is one frame, and a frame is bytes: no charset, no trimming.
// A ROUTER puts the identity of the peer at the head of the address and takes it
// off again; at a DEALER the address of a message is usually empty.
const (
	clientProtocol = "MDPC01"
	workerProtocol = "MDPW01"
)

// Kind says what a message is. A worker's message has a command byte on the wire,
// and that is its Kind (RFC 7, "MDP/Worker"); a client's message has none.
type Kind int16

const (
	KindClient     Kind = -1
	KindReady      Kind = 0x01
	KindRequest    Kind = 0x02
	KindReply      Kind = 0x03
	KindHeartbeat  Kind = 0x04
	KindDisconnect Kind = 0x05
)

func (k Kind) String() string {
	switch k {
	case KindClient:
		return clientProtocol
	case KindReady:
		return "READY"
	case KindRequest:
		return "REQUEST"
	case KindReply:
		return "REPLY"
	case KindHeartbeat:
		return "HEARTBEAT"
	case KindDisconnect:
		return "DISCONNECT"
	}
	return fmt.Sprintf("command 0x%02x", int16(k))
}

// Message is one MDP message taken apart. Beside Address and Kind it has
//
//	Service, Body   when it is a client's
//	Service         as a READY
//	Client, Body    as a REQUEST or a REPLY
type Message struct {
	Address [][]byte // of the peer that it comes from or goes to
	Kind    Kind
	Service []byte
	Client  [][]byte // what a worker is given with a request and returns with the reply
	Body    [][]byte
}

var (
	errNoProtocol = errors.New("no MDPC01 or MDPW01 frame after an empty frame")
	errNoCommand  = errors.New("no one-byte command after MDPW01")
	errNoService  = errors.New("no service name")
	errNoClient   = errors.New("no empty frame after the client's address")
)

// Parse takes the frames of one message apart without copying them. An error says
// what is wrong with the frames, in words for a log; the Address is there even then,
// as far as it could be told.
//
// Two slips of real peers are forgiven because their meaning is clear: no empty
// frame before the protocol (Dispatchr Backbone's broker when it says DISCONNECT),
// and frames after a command that takes none (its Node.js service, likewise).
func Parse(frames [][]byte) (Message, error) {
	address, rest, _ := cutAtEmpty(frames)
	if len(rest) == 0 || !isProtocol(rest[0]) {
		i := slices.IndexFunc(address, isProtocol)
		if i < 0 {
			return Message{Address: address}, errNoProtocol
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
		m.Service = rest[0]
		if m.Kind == KindClient {
			m.Body = rest[1:]
		}
	case KindRequest, KindReply:
		var found bool
		if m.Client, m.Body, found = cutAtEmpty(rest); !found {
			return m, fmt.Errorf("%v: %w", m.Kind, errNoClient)
		}
	case KindHeartbeat, KindDisconnect:
	default:
		return m, fmt.Errorf("unknown %v", m.Kind)
	}
	return m, nil
}

// Frames that are in every message, and not to be written to.
var (
	clientFrame   = []byte(clientProtocol)
	workerFrame   = []byte(workerProtocol)
	commandFrames = []byte{0, byte(KindReady), byte(KindRequest), byte(KindReply), byte(KindHeartbeat), byte(KindDisconnect)}
)

// Frames is the inverse of Parse.
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
func cutAtEmpty(frames [][]byte) (before, after [][]byte, found bool) {
	i := slices.IndexFunc(frames, func(f []byte) bool { return len(f) == 0 })
	if i < 0 {
		return frames, nil, false
	}
	return frames[:i], frames[i+1:], true
}

func isProtocol(frame []byte) bool {
	return string(frame) == clientProtocol || string(frame) == workerProtocol
}

// The broker's own services (RFC 8, MMI). It answers every name with this prefix
// itself and lets no worker register one.
const (
	mmiPrefix   = "mmi."
	mmiService  = "mmi.service"  // body: a service name; reply: found or not found
	mmiServices = "mmi.services" // reply: a table of the services
	mmiMetrics  = "mmi.metrics"  // reply: Prometheus' text format
	mmiCancel   = "mmi.cancel"   // drops the client's waiting requests; reply: found or not found

	mmiFound          = "200"
	mmiBadRequest     = "400"
	mmiNotFound       = "404"
	mmiNotImplemented = "501"
)

const statusPrefix = "exit status "

// statusReply is the body that tells a client about anything but plain success:
// exactly three frames, standard output, standard error, and the exit status in words.
func statusReply(stdout, stderr []byte, status int) [][]byte {
	return [][]byte{stdout, stderr, []byte(statusPrefix + strconv.Itoa(status))}
}

// parseStatusReply recognises a status reply, and the pair of frames that Dispatchr
// Backbone's services send for a failure: "Error", message. Any other body is data.
func parseStatusReply(body [][]byte) (stdout, stderr []byte, status int, ok bool) {
	switch {
	case len(body) == 3:
		digits, found := strings.CutPrefix(string(body[2]), statusPrefix)
		n, err := strconv.ParseUint(digits, 10, 8)
		if found && err == nil {
			return body[0], body[1], int(n), true
		}
	case len(body) == 2 && string(body[0]) == "Error":
		return nil, fmt.Appendf(nil, "%s\n", body[1]), 1, true
	}
	return nil, nil, 0, false
}

func framesOf(texts []string) [][]byte {
	var frames [][]byte
	for _, text := range texts {
		frames = append(frames, []byte(text))
	}
	return frames
}

func sizeOf(body [][]byte) size {
	n := 0
	for _, frame := range body {
		n += len(frame)
	}
	return size(n)
}
