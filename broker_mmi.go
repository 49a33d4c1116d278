package main

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// manage answers a request to the broker itself (RFC 8, and more).
func (b *Broker) manage(name string, client, body [][]byte) []byte {
	switch name {
	case mmiService:
		if len(body) != 1 {
			return []byte(mmiBadRequest)
		}
		s, ok := b.services[string(body[0])]
		return found(ok && s.workers > 0)
	case mmiCancel:
		return found(b.cancel(client) > 0)
	case mmiServices:
		return b.table()
	case mmiMetrics:
		return b.metrics()
	}
	return []byte(mmiNotImplemented)
}

// isOurs tells whether a name is one that only the broker answers.
func isOurs(name []byte) bool { return bytes.HasPrefix(name, []byte(mmiPrefix)) }

func found(yes bool) []byte {
	if yes {
		return []byte(mmiFound)
	}
	return []byte(mmiNotFound)
}

// cancel drops the waiting requests of a client and returns how many. They are those
// whose address begins with the client's: it may have put frames of its own behind,
// and others may share its identity behind a proxy.
func (b *Broker) cancel(client [][]byte) (dropped int) {
	own, ok := b.waiting[string(client[0])]
	if !ok {
		return 0
	}
	for e := own.Front(); e != nil; {
		r := e.Value.(*request)
		e = e.Next()
		if len(r.client) < len(client) || !slices.EqualFunc(r.client[:len(client)], client, bytes.Equal) {
			continue
		}
		b.dequeue(r)
		b.end(r)
		b.count(r.service, cancelled, 1)
		b.settle(r.service)
		dropped++
	}
	return dropped
}

// A tally is what happened to one service, or to all there ever were.
type tally struct {
	counts [len(counters)]uint64
	times  [len(durations)]histogram
}

type counter int

const (
	requests counter = iota
	replies
	failures
	lostWorkers
	redelivered
	refused
	expired
	cancelled
	droppedReplies
	bytesIn
	bytesOut
)

// A metric is a name and a help text as Prometheus wants them.
type metric struct{ name, help string }

var counters = [...]metric{
	requests:       {"requests_total", "Requests that came from clients."},
	replies:        {"replies_total", "Replies that came from workers."},
	failures:       {"failures_total", "Replies that told of a failed command."},
	lostWorkers:    {"lost_workers_total", "Workers that were gone or silent or broke the protocol."},
	redelivered:    {"redelivered_total", "Requests of lost workers that were given to another."},
	refused:        {"refused_total", "Requests refused with status 75."},
	expired:        {"expired_total", "Requests that no worker came for."},
	cancelled:      {"cancelled_total", "Requests that their client gave up before they began."},
	droppedReplies: {"dropped_replies_total", "Replies whose client was gone or did not read."},
	bytesIn:        {"request_bytes_total", "Bytes in the bodies of requests."},
	bytesOut:       {"reply_bytes_total", "Bytes in the bodies of replies that were sent."},
}

const (
	waited = iota
	served
)

var durations = [...]metric{
	waited: {"wait_seconds", "Time from a request's arrival to its worker."},
	served: {"serve_seconds", "Time from a request's worker to its reply."},
}

func (b *Broker) count(s *service, c counter, n uint64) {
	b.total.counts[c] += n
	s.tally.counts[c] += n
}

func (b *Broker) observe(s *service, which int, d time.Duration) {
	b.total.times[which].observe(d)
	s.tally.times[which].observe(d)
}

// A histogram counts durations up to each of its bounds, in seconds.
type histogram struct {
	buckets [len(bounds)]uint64
	count   uint64
	sum     time.Duration
}

var bounds = [...]float64{0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300}

func (h *histogram) observe(d time.Duration) {
	h.count++
	h.sum += d
	if i, _ := slices.BinarySearch(bounds[:], d.Seconds()); i < len(bounds) {
		h.buckets[i]++
	}
}

// sorted are the services by name.
func (b *Broker) sorted() []*service {
	return slices.SortedFunc(maps.Values(b.services), func(x, y *service) int { return strings.Compare(x.name, y.name) })
}

// table is the reply to mmi.services: a line for each, with a header. Names that would
// break a line are quoted.
func (b *Broker) table() []byte {
	out := []byte("service\tworkers\tidle\twaiting\tin flight\tserved\tfailed\n")
	for _, s := range b.sorted() {
		out = fmt.Appendf(out, "%s\t%d\t%d\t%d\t%d\t%d\t%d\n", printable(s.name), s.workers, s.idle.Len(), s.waiting.Len(),
			s.workers-s.idle.Len(), s.tally.counts[replies], s.tally.counts[failures])
	}
	return out
}

// A view is what the metrics tell of one service, or of all of them together.
type view struct {
	label                  string // of the service, or empty
	workers, idle, waiting int
	*tally
}

// metrics is the reply to mmi.metrics: Prometheus' text format. What ends in _total or
// is a histogram of a service begins anew when the service was gone for a while; the
// broker's own go on.
func (b *Broker) metrics() []byte {
	all := view{workers: len(b.workers), tally: &b.total}
	var each []view
	for _, s := range b.sorted() {
		label := fmt.Sprintf(`service="%s"`, labelEscaper.Replace(strings.ToValidUTF8(s.name, "\uFFFD")))
		each = append(each, view{label, s.workers, s.idle.Len(), s.waiting.Len(), &s.tally})
		all.idle += s.idle.Len()
		all.waiting += s.waiting.Len()
	}

	var out []byte
	head := func(kind, name, help string) {
		out = fmt.Appendf(out, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
	}
	// family writes one metric: of the broker, and of each service.
	family := func(kind string, m metric, sample func(name string, v view)) {
		head(kind, "backbone_"+m.name, m.help)
		sample("backbone_"+m.name, all)
		head(kind, "backbone_service_"+m.name, m.help)
		for _, v := range each {
			sample("backbone_service_"+m.name, v)
		}
	}
	number := func(kind string, m metric, value func(v view) uint64) {
		family(kind, m, func(name string, v view) {
			out = fmt.Appendf(out, "%s%s %d\n", name, labels(v.label), value(v))
		})
	}

	head("gauge", "backbone_uptime_seconds", "Time since the broker began.")
	out = fmt.Appendf(out, "backbone_uptime_seconds %g\n", b.now.Sub(b.born).Seconds())
	number("gauge", metric{"workers", "Workers that are registered."}, func(v view) uint64 { return uint64(v.workers) })
	number("gauge", metric{"idle_workers", "Workers without a request."}, func(v view) uint64 { return uint64(v.idle) })
	number("gauge", metric{"queue_length", "Requests that wait for a worker."}, func(v view) uint64 { return uint64(v.waiting) })
	for c, m := range counters {
		number("counter", m, func(v view) uint64 { return v.counts[c] })
	}
	for d, m := range durations {
		family("histogram", m, func(name string, v view) {
			h, below := &v.times[d], uint64(0)
			for i, bound := range bounds {
				below += h.buckets[i]
				out = fmt.Appendf(out, "%s_bucket%s %d\n", name, labels(v.label, fmt.Sprintf(`le="%g"`, bound)), below)
			}
			out = fmt.Appendf(out, "%s_bucket%s %d\n", name, labels(v.label, `le="+Inf"`), h.count)
			out = fmt.Appendf(out, "%s_sum%s %g\n", name, labels(v.label), h.sum.Seconds())
			out = fmt.Appendf(out, "%s_count%s %d\n", name, labels(v.label), h.count)
		})
	}
	return out
}

var labelEscaper = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

// labels are those that are not empty, in braces.
func labels(some ...string) string {
	some = slices.DeleteFunc(some, func(label string) bool { return label == "" })
	if len(some) == 0 {
		return ""
	}
	return "{" + strings.Join(some, ",") + "}"
}
