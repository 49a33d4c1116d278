package main

import (
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"
)

func TestManagementServiceTellsWhetherANameIsServed(t *testing.T) {
	r := newFakeRouter(t)
	r.from("W", "", "MDPW01", "\x01", "echo")
	r.from("C", "", "MDPC01", "waited-for", "x")
	for _, test := range []struct {
		request []string
		code    string
	}{
		{[]string{"mmi.service", "echo"}, "200"},
		{[]string{"mmi.service", "waited-for"}, "404"},
		{[]string{"mmi.service", "nobody"}, "404"},
		{[]string{"mmi.service", ""}, "404"},
		{[]string{"mmi.service"}, "400"},
		{[]string{"mmi.service", "echo", "echo"}, "400"},
		{[]string{"mmi.nonsense", "echo"}, "501"},
		{[]string{"mmi.", "echo"}, "501"},
	} {
		r.from(append([]string{"C", "7", "", "MDPC01"}, test.request...)...)
		r.expect([]string{"C", "7", "", "MDPC01", test.request[0], test.code})
	}

	// A service is also found while its only worker is busy.
	r.from("C", "", "MDPC01", "echo")
	r.expect(toWorker("W", "*"))
	r.from("C", "", "MDPC01", "mmi.service", "echo")
	r.expect([]string{"C", "", "MDPC01", "mmi.service", "200"})
}

func TestTableHasALineForEachService(t *testing.T) {
	r := newFakeRouter(t)
	r.from("W1", "", "MDPW01", "\x01", "echo")
	r.from("W2", "", "MDPW01", "\x01", "echo")
	r.from("C", "", "MDPC01", "odd\tname\n")
	for _, reply := range [][]string{{"fine"}, {"", "", "exit status 1"}, {"", "", "exit status 0"}} {
		r.from("C", "", "MDPC01", "echo")
		wild := r.expect([]string{"*", "", "MDPW01", "\x02", "*", ""})
		r.from(append([]string{wild[0], "", "MDPW01", "\x03", wild[1], ""}, reply...)...)
		r.sent = nil
	}
	r.from("C", "", "MDPC01", "echo")
	r.sent = nil
	r.from("C", "", "MDPC01", "mmi.services")
	r.expect([]string{"C", "", "MDPC01", "mmi.services",
		"service\tworkers\tidle\twaiting\tin flight\tserved\tfailed\n" +
			"echo\t2\t1\t0\t1\t3\t1\n" +
			"\"odd\\tname\\n\"\t0\t0\t1\t0\t0\t0\n"})
}

func TestMetricsAreWhatHappened(t *testing.T) {
	r := newFakeRouter(t)
	r.from("W", "", "MDPW01", "\x01", "echo\"\xff")
	r.from("C", "", "MDPC01", "echo\"\xff", "hello")
	token := r.expect(toWorker("W", "*", "hello"))[0]
	r.from("C", "", "MDPC01", "echo\"\xff", "bye")
	r.clock = r.clock.Add(time.Second / 2)
	r.from("W", "", "MDPW01", "\x03", token, "", "it is", "done")
	r.sent = nil
	r.failed["C"] = errGone
	r.failed["W"] = errGone
	r.pass(2)
	delete(r.failed, "C")
	r.from("C", "", "MDPC01", "mmi.metrics")
	metrics := r.expect([]string{"C", "", "MDPC01", "mmi.metrics", "*"})[0]
	for _, line := range []string{
		"# TYPE backbone_requests_total counter",
		"backbone_uptime_seconds 2.5",
		"backbone_held_bytes 0",
		"backbone_held_max_bytes 1048576",
		"backbone_workers 0",
		"backbone_queue_length 0",
		"backbone_requests_total 2",
		"backbone_replies_total 1",
		"backbone_lost_workers_total 1",
		"backbone_dropped_replies_total 1",
		"backbone_request_bytes_total 8",
		"backbone_reply_bytes_total 9",
		`backbone_serve_seconds_bucket{le="0.3"} 0`,
		`backbone_serve_seconds_bucket{le="1"} 1`,
		`backbone_serve_seconds_bucket{le="+Inf"} 1`,
		"backbone_serve_seconds_sum 0.5",
		"backbone_wait_seconds_count 2",
	} {
		if !strings.Contains(metrics, "\n"+line+"\n") {
			t.Errorf("the metrics lack %q", line)
		}
	}
	if build := regexp.MustCompile(`(?m)^backbone_build_info\{version=".+",libzmq="4\.\d+\.\d+"\} 1$`); !build.MatchString(metrics) {
		t.Error("the metrics lack backbone_build_info")
	}
	if strings.Contains(metrics, "echo") {
		t.Error("the metrics contain a service that no longer exists")
	}

	r.from("V", "", "MDPW01", "\x01", "echo\"\xff")
	r.from("C", "", "MDPC01", "nobody", "waits")
	r.from("C", "", "MDPC01", "mmi.metrics")
	metrics = r.expect([]string{"C", "", "MDPC01", "mmi.metrics", "*"})[0]
	if line := "backbone_service_workers{service=\"\\\"echo\\\\\\\"\\\\xff\\\"\"} 1\n"; !strings.Contains(metrics, line) {
		t.Errorf("the metrics lack %q", line)
	}
	if line := fmt.Sprintf("\nbackbone_held_bytes %d\n", r.held); r.held == 0 || !strings.Contains(metrics, line) {
		t.Errorf("the metrics lack %q", line)
	}
	seen := map[string]bool{}
	for line := range strings.Lines(metrics) {
		if !metricLine.MatchString(line) {
			t.Errorf("not in the format of Prometheus: %q", line)
		}
		if sample, _, ok := strings.Cut(line, " "); ok && sample != "#" && seen[sample] {
			t.Errorf("%s occurs twice", sample)
		} else {
			seen[sample] = true
		}
	}
}

var metricLine = regexp.MustCompile(`^(# HELP [a-z_]+ .+|# TYPE [a-z_]+ (counter|gauge|histogram)|` +
	`[a-z_]+(\{[a-z]+="([^"\\]|\\.)*"(,(le|libzmq)="[^"]+")?\})? [0-9.e+-]+)\n$`)
