package main

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// managed are the names that manage answers.
var managed = []string{mmiService, mmiCancel, mmiCredit, mmiServices, mmiMetrics}

// manage answers a request to the broker itself: RFC 8 and, beyond it, what mdp.go lists.
func (b *Broker) manage(name string, c *brokerClient, address, body [][]byte, mine *grant) []byte {
	switch name {
	case mmiService:
		if len(body) != 1 {
			return []byte(mmiBadRequest)
		}
		s, ok := b.services[string(body[0])]
		return mmiCode(ok && (s.workers > 0 || b.now.Before(s.returning)) || slices.Contains(managed, string(body[0])))
	case mmiCancel:
		return mmiCode(b.cancel(c, address[1:]) > 0)
	case mmiCredit:
		return []byte(b.credit(c, address[1:], body))
	case mmiServices:
		if mine.manage {
			mine = nil // All who see everything share a report.
		}
		return b.report(reportKey{name, mine}, func() []byte { return b.table(mine) })
	case mmiMetrics:
		return b.report(reportKey{name, nil}, b.metrics)
	}
	return []byte(mmiNotImplemented)
}

// A reportKey says what a report is of, and who sees only a part of it; nil is everybody else.
type reportKey struct {
	service string
	reader  *grant
}

// A report is what a management service replied last.
type report struct {
	text  []byte
	until time.Time // it is made anew
}

// report returns what compose makes. With many services it takes long: then it is made once a second
// at most, however often it is asked for.
func (b *Broker) report(key reportKey, compose func() []byte) []byte {
	last, ok := b.reports[key]
	if ok && b.now.Before(last.until) {
		return last.text
	}
	last = report{text: compose()}
	if len(b.services) > freshServices {
		last.until = b.now.Add(time.Second)
		b.reports[key] = last
	}
	return last.text
}

const (
	freshServices  = 20   // with more, reports are made once a second at most
	servedMetrics  = 1000 // services with workers that have metrics of their own
	waitingMetrics = 100  // services without workers that do; anybody can make up names
)

func mmiCode(found bool) []byte {
	if found {
		return []byte(mmiFound)
	}
	return []byte(mmiNotFound)
}

// A tally counts what happened to one service, or to all that there ever were.
type tally struct {
	counts [len(counters)]uint64
	times  [len(timings)]histogram
}

// A metric is a name and a help text as Prometheus wants them.
type metric struct{ name, help string }

type counter int

const (
	requestsTotal counter = iota
	repliesTotal
	failuresTotal
	lostWorkersTotal
	redeliveredTotal
	refusedTotal
	expiredTotal
	cancelledTotal
	abandonedTotal
	poisonedTotal
	droppedRepliesTotal
	unauthorizedTotal
	requestBytes
	replyBytes
)

var counters = [...]metric{
	requestsTotal:       {"requests_total", "Requests that came from clients."},
	repliesTotal:        {"replies_total", "Replies that came from workers."},
	failuresTotal:       {"failures_total", "Replies of commands that failed."},
	lostWorkersTotal:    {"lost_workers_total", "Workers that vanished, fell silent or broke the protocol."},
	redeliveredTotal:    {"redelivered_total", "Requests of lost workers that another worker was given."},
	refusedTotal:        {"refused_total", "Requests refused with status 75."},
	expiredTotal:        {"expired_total", "Requests for which no worker came."},
	cancelledTotal:      {"cancelled_total", "Requests that their client gave up, before they began or while they ran."},
	abandonedTotal:      {"abandoned_total", "Requests that were dropped because their client was gone."},
	poisonedTotal:       {"poisoned_total", "Requests that failed because workers returned them again and again."},
	droppedRepliesTotal: {"dropped_replies_total", "Replies whose client was gone or did not read."},
	unauthorizedTotal:   {"unauthorized_total", "Requests and workers that their key does not allow."},
	requestBytes:        {"request_bytes_total", "Bytes in the bodies of requests."},
	replyBytes:          {"reply_bytes_total", "Bytes in the bodies of replies that were sent."},
}

type timing int

const (
	waitSeconds timing = iota
	serveSeconds
)

var timings = [...]metric{
	waitSeconds:  {"wait_seconds", "Time from the arrival of a request to its worker."},
	serveSeconds: {"serve_seconds", "Time from the worker of a request to its reply."},
}

// count counts something of a service, which may be nil.
func (b *Broker) count(s *brokerService, c counter, n uint64) {
	b.total.counts[c] += n
	if s != nil {
		s.tally.counts[c] += n
	}
}

func (b *Broker) observe(s *brokerService, t timing, d time.Duration) {
	b.total.times[t].observe(d)
	s.tally.times[t].observe(d)
}

// A histogram counts durations up to each of its bounds, in seconds.
type histogram struct {
	buckets [len(bucketBounds)]uint64
	count   uint64
	sum     time.Duration
}

var bucketBounds = [...]float64{0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300}

func (h *histogram) observe(d time.Duration) {
	h.count++
	h.sum += d
	if i, _ := slices.BinarySearch(bucketBounds[:], d.Seconds()); i < len(bucketBounds) {
		h.buckets[i]++
	}
}

// sortedServices returns the services in the order of their names.
func (b *Broker) sortedServices() []*brokerService {
	return slices.SortedFunc(maps.Values(b.services), func(x, y *brokerService) int { return strings.Compare(x.name, y.name) })
}

// table returns the reply to mmi.services: a header and a line for each service, or for each that the
// reader may call unless that is nil. Names that would break a line are quoted.
func (b *Broker) table(reader *grant) []byte {
	out := []byte(servicesHeader)
	for _, s := range b.sortedServices() {
		if reader != nil && !reader.mayCall(s.name) {
			continue
		}
		out = fmt.Appendf(out, "%s\t%d\t%d\t%d\t%d\t%d\t%d\n", printable(s.name), s.workers, s.idle.Len(), s.waiting,
			s.workers-s.idle.Len()-s.elsewhere, s.tally.counts[repliesTotal], s.tally.counts[failuresTotal])
	}
	return out
}

// A sample is what the metrics tell of one service, or of all of them together.
type sample struct {
	label                  string // of the service, or empty
	workers, idle, waiting int
	*tally
}

// metrics returns the reply to mmi.metrics, in Prometheus' text format. The counters and histograms
// of a service begin anew when the service was gone for a while; those of the broker go on.
func (b *Broker) metrics() []byte {
	all := sample{workers: len(b.workers), tally: &b.total}
	var each []sample
	room := map[bool]int{true: servedMetrics, false: waitingMetrics} // by whether there are workers
	for _, s := range b.sortedServices() {
		all.idle += s.idle.Len()
		all.waiting += s.waiting
		if served := s.workers > 0; room[served] > 0 {
			room[served]--
			each = append(each, sample{fmt.Sprintf(`service="%s"`, labelValue(s.name)), s.workers, s.idle.Len(), s.waiting, &s.tally})
		}
	}

	var out []byte
	if left := len(b.services) - len(each); left > 0 {
		out = fmt.Appendf(out, "# %d more services have no metrics of their own here.\n", left)
	}
	head := func(kind, name, help string) {
		out = fmt.Appendf(out, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
	}
	// family writes a metric of the broker, and that of each service.
	family := func(kind string, m metric, write func(name string, v sample)) {
		head(kind, "backbone_"+m.name, m.help)
		write("backbone_"+m.name, all)
		head(kind, "backbone_service_"+m.name, m.help)
		for _, v := range each {
			write("backbone_service_"+m.name, v)
		}
	}
	number := func(kind string, m metric, value func(v sample) uint64) {
		family(kind, m, func(name string, v sample) {
			out = fmt.Appendf(out, "%s%s %d\n", name, labels(v.label), value(v))
		})
	}

	gauge := func(m metric, labels string, value float64) {
		head("gauge", "backbone_"+m.name, m.help)
		out = fmt.Appendf(out, "backbone_%s%s %s\n", m.name, labels, strconv.FormatFloat(value, 'f', -1, 64))
	}
	build := labels(fmt.Sprintf(`version="%s"`, labelValue(buildVersion())), fmt.Sprintf(`libzmq="%s"`, libraryVersion()))
	gauge(metric{"build_info", "Always 1; the labels give the versions of the broker and of libzmq."}, build, 1)
	gauge(metric{"uptime_seconds", "Time since the broker was started."}, "", b.now.Sub(b.begin).Seconds())
	gauge(metric{"held_bytes", "Bytes of requests and unread replies that the broker holds."}, "", float64(b.held+b.outlet.queued()))
	gauge(metric{"held_max_bytes", "Limit of held bytes (--max-memory)."}, "", float64(b.MaxMemory))
	number("gauge", metric{"workers", "Workers that are registered."}, func(v sample) uint64 { return uint64(v.workers) })
	number("gauge", metric{"idle_workers", "Workers without a request."}, func(v sample) uint64 { return uint64(v.idle) })
	number("gauge", metric{"queue_length", "Requests that wait for a worker."}, func(v sample) uint64 { return uint64(v.waiting) })
	for c, m := range counters {
		number("counter", m, func(v sample) uint64 { return v.counts[c] })
	}
	for t, m := range timings {
		family("histogram", m, func(name string, v sample) {
			h, below := &v.times[t], uint64(0)
			for i, bound := range bucketBounds {
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

// labelValue returns a name as the value of a label, which is UTF-8. A name that is not, or hides
// something, is quoted, so that different names stay different.
func labelValue(name string) string {
	if !utf8.ValidString(name) || strings.ContainsFunc(name, unicode.IsControl) {
		name = strconv.QuoteToASCII(name)
	}
	return labelEscaper.Replace(name)
}

// labels returns those that are not empty, in braces.
func labels(some ...string) string {
	some = slices.DeleteFunc(some, func(label string) bool { return label == "" })
	if len(some) == 0 {
		return ""
	}
	return "{" + strings.Join(some, ",") + "}"
}
