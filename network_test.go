package main

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// The tests in this file check what happens when a host vanishes without a word, freezes, or is
// behind a slow link. A process that is killed shows none of this: its kernel closes the
// connections.

// A network is a system with two hosts that are joined by a link: the broker's, and a remote one. A
// host is a network namespace; the link is a pair of virtual Ethernet devices. The broker listens
// at tcp for the remote host, and at the ipc endpoint of the system for programs near it: a path is
// the same in all network namespaces.
type network struct {
	*system
	hosts []string // the names of the namespaces, the broker's first
}

const (
	linkDevice    = "link0"
	brokerIP      = "192.0.2.1" // from a range that no real host has
	remoteAddress = "192.0.2.2"
)

// newNetwork returns a network. Its broker has a heartbeat interval of 100 ms unless the flags set
// another.
func newNetwork(t *testing.T, flags ...string) *network {
	t.Helper()
	n := newHosts(t, 2)
	n.join(0, linkDevice, brokerIP, 1, linkDevice, remoteAddress)
	n.broker = n.startOn(0, n.endpoint, "bbroker", append([]string{"--heartbeat", "100ms",
		"--broker", n.endpoint, "--broker", n.remoteEndpoint()}, flags...)...)
	return n
}

// newHosts returns a network of hosts that nothing joins yet.
func newHosts(t *testing.T, count int) *network {
	t.Helper()
	switch {
	case runtime.GOOS != "linux":
		t.Skip("only Linux has network namespaces")
	case os.Geteuid() != 0:
		t.Skip("only root can make network namespaces")
	}
	if _, err := exec.LookPath("ip"); err != nil {
		skipAsRoot(t, "iproute2 is not installed; run scripts/bootstrap --all")
	}
	n := &network{system: newSystemWithoutBroker(t)}
	for i := range count {
		n.hosts = append(n.hosts, fmt.Sprintf("backbone-%d-%d", os.Getpid(), i))
	}
	n.removeAtTheEnd()
	for _, host := range n.hosts {
		if output, err := exec.Command("ip", "netns", "add", host).CombinedOutput(); err != nil {
			skipAsRoot(t, "root cannot make network namespaces here: "+string(output))
		}
	}
	return n
}

// join joins two hosts by a link, which each has as a device with an address.
func (n *network) join(host int, device, address string, otherHost int, otherDevice, otherAddress string) {
	n.t.Helper()
	// Both ends are made inside, so that the network of this machine does not change.
	if output, err := exec.Command("ip", "link", "add", device, "netns", n.hosts[host],
		"type", "veth", "peer", "name", otherDevice, "netns", n.hosts[otherHost]).CombinedOutput(); err != nil {
		skipAsRoot(n.t, "this kernel has no virtual Ethernet devices: "+string(output))
	}
	n.ip(host, "address", "add", address+"/30", "dev", device)
	n.ip(otherHost, "address", "add", otherAddress+"/30", "dev", otherDevice)
	n.ip(host, "link", "set", device, "up")
	n.ip(otherHost, "link", "set", otherDevice, "up")
}

// skipAsRoot skips a test that root can run on a machine with all that the tests need.
func skipAsRoot(t testing.TB, why string) {
	t.Helper()
	if os.Getenv("BACKBONE_SKIP_NOTHING") != "" {
		t.Fatal(why)
	}
	t.Skip(why)
}

// removeAtTheEnd removes the hosts and what runs on them at the end of the test, even if this
// process is killed or panics: then the shell that does it reads the end of its input.
func (n *network) removeAtTheEnd() {
	script := `trap "" HUP INT QUIT TERM
		read x
		for host; do
			kill -9 $(ip netns pids $host)
			ip netns delete $host
		done 2>/dev/null`
	remover := exec.Command("sh", append([]string{"-c", script, "sh"}, n.hosts...)...)
	stdin, err := remover.StdinPipe()
	if err == nil {
		err = remover.Start()
	}
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() {
		stdin.Close()
		remover.Wait()
	})
}

// ip runs ip(8) on a host.
func (n *network) ip(host int, args ...string) {
	n.t.Helper()
	command := exec.Command("ip", append([]string{"-netns", n.hosts[host]}, args...)...)
	if output, err := command.CombinedOutput(); err != nil {
		n.t.Fatalf("ip %q: %v: %s", args, err, output)
	}
}

func (n *network) startOn(host int, endpoint, name string, args ...string) *childProcess {
	n.t.Helper()
	args = append([]string{"netns", "exec", n.hosts[host], name}, args...)
	return start(n.t, n.dir, endpoint, "ip", args...)
}

func (n *network) remoteEndpoint() string { return "tcp://" + brokerIP + ":5555" }

// startRemote starts a program on the remote host.
func (n *network) startRemote(name string, args ...string) *childProcess {
	n.t.Helper()
	return n.startOn(1, n.remoteEndpoint(), name, args...)
}

// cut lets the link lose all packets in silence, in both directions: each host sends them to an
// Ethernet address that nobody has. A link that is down would tell the hosts.
func (n *network) cut() {
	n.t.Helper()
	for i, peer := range []string{remoteAddress, brokerIP} {
		n.ip(i, "neighbour", "replace", peer, "dev", linkDevice,
			"lladdr", "02:00:00:00:00:01", "nud", "permanent")
	}
}

// mend undoes cut.
func (n *network) mend() {
	n.t.Helper()
	for i, peer := range []string{remoteAddress, brokerIP} {
		n.ip(i, "neighbour", "delete", peer, "dev", linkDevice)
	}
}

// slow limits the link to so many Mbit/s in each direction.
func (n *network) slow(rate int) {
	n.t.Helper()
	for _, host := range n.hosts {
		command := exec.Command("tc", "-netns", host, "qdisc", "add", "dev", linkDevice, "root",
			"tbf", "rate", fmt.Sprint(rate, "mbit"), "burst", "64kb", "latency", "50ms")
		if output, err := command.CombinedOutput(); err != nil {
			skipAsRoot(n.t, fmt.Sprintf("no link can be slowed down here: %v: %s", err, output))
		}
	}
}

func TestBusyWorkerWhoseHostVanishesFailsItsClient(t *testing.T) {
	n := newNetwork(t)
	n.startRemote("bservice", "--heartbeat", "100ms", "hang",
		"sh", "-c", `echo "$1" >>runs; exec sleep 1000`, "sh")
	request := n.start("brequest", "hang", "once")
	n.waitForRuns(1)
	n.cut()
	if got := request.waitForExit(); got != 69 {
		t.Errorf("status %d, want 69", got)
	}
	if lost := n.metric("backbone_lost_workers_total"); lost != 1 {
		t.Errorf("%d workers were lost, want 1", lost)
	}
}

func TestServiceAndClientFindTheBrokerAfterAPartition(t *testing.T) {
	n := newNetwork(t)
	n.startShellService("near", `printf near`)
	far := n.startRemote("bservice", "--heartbeat", "100ms", "far", "echo", "far")
	n.waitForMetric("backbone_workers", 2)
	n.cut()
	n.waitForMetric("backbone_workers", 1)
	// The service has tried to connect in vain once it says that it waits.
	far.waitForLines(1, "the broker was silent")
	far.waitForLines(1, "waiting for a broker")
	fromFar := n.startRemote("brequest", "near", "x")
	toFar := n.start("brequest", "far", "x")
	n.waitForMetric("backbone_queue_length", 1)
	n.mend()
	if got := toFar.waitForExit(); got != 0 {
		t.Errorf("the request to the service: status %d, want 0", got)
	}
	if got := fromFar.waitForExit(); got != 0 {
		t.Errorf("the request of the client: status %d, want 0", got)
	}
}

// Heartbeats wait behind a long message on a slow link. Neither side may take that for the end of
// the other, or the request fails with 69. The message takes 1.7 s, and the liveness is 1 s.
const (
	slowRate   = 10 // Mbit/s
	longLength = 2 << 20
)

func TestLongRequestPassesASlowLink(t *testing.T) {
	n := newNetwork(t, "--heartbeat", "200ms")
	n.startRemote("bservice", "--heartbeat", "200ms", "--stdin", "length", "wc", "-c")
	n.waitForMetric("backbone_workers", 1)
	n.slow(slowRate)
	reply, err := n.request("length", strings.Repeat("x", longLength))
	if want := []string{fmt.Sprintln(longLength)}; err != nil || !slices.Equal(reply, want) {
		t.Errorf("the reply is %q, %v, want %q", reply, err, want)
	}
}

func TestLongReplyPassesASlowLink(t *testing.T) {
	n := newNetwork(t, "--heartbeat", "200ms")
	n.startRemote("bservice", "--heartbeat", "200ms", "zeros",
		"head", "-c", fmt.Sprint(longLength), "/dev/zero")
	n.waitForMetric("backbone_workers", 1)
	n.slow(slowRate)
	reply, err := n.request("zeros")
	if want := []string{strings.Repeat("\x00", longLength)}; err != nil || !slices.Equal(reply, want) {
		t.Errorf("the reply begins with %.200q, %v, want %d zeros", reply, err, longLength)
	}
}
