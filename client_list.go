package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/mattn/go-isatty"
)

// list prints the table of services as the broker sends it, or in columns for a person. It asks several
// brokers at the same time, and prints what those that answer send, with a column for the broker.
func (t *requestTool) list(brokers []brokerAddress) error {
	stop, restore := interruptible()
	defer restore()
	tables, failures := make([][]byte, len(brokers)), make([]error, len(brokers))
	var asked sync.WaitGroup
	for i, broker := range brokers {
		asked.Go(func() { tables[i], failures[i] = t.tableOf(stop, broker) })
	}
	asked.Wait()
	if stop.Err() != nil {
		return context.Cause(stop)
	}

	table := tables[0]
	if len(brokers) > 1 {
		table = joinTables(tables, brokers)
	}
	if err := t.printTable(table); err != nil {
		return err
	}
	failures = slices.DeleteFunc(failures, func(err error) bool { return err == nil })
	if len(failures) == 0 {
		return nil
	}
	for _, err := range failures[1:] {
		t.console("brequest").report(err)
	}
	return failures[0]
}

// tableOf returns the table of services of a broker.
func (t *requestTool) tableOf(stop context.Context, broker brokerAddress) ([]byte, error) {
	client := newClient(stop, []brokerAddress{broker})
	defer client.Disconnect()
	reply, err := client.Send(mmiServices, emptyBody, t.within(5*time.Second))
	switch {
	case err != nil && !errors.Is(err, errTimeout):
		return nil, err
	case reply.FromBroker: // It may not be allowed.
		os.Stderr.Write(reply.Stderr)
		return nil, failureIn(reply)
	case err != nil, len(reply.Output) != 1, string(reply.Output[0]) == mmiNotImplemented:
		status := exitUnavailable
		if err != nil {
			status = exitTimeout
		}
		return nil, &failure{status: status, err: fmt.Errorf("the broker at %s does not list its services", broker.endpoint),
			hint: "bbroker does; other brokers may not know " + mmiServices}
	}
	return reply.Output[0], nil
}

// joinTables returns the lines of all tables below one header, each with the endpoint of its broker.
func joinTables(tables [][]byte, brokers []brokerAddress) (joined []byte) {
	for i, table := range tables {
		for line := range bytes.Lines(table) {
			isHeader, broker := string(line) == servicesHeader, brokers[i].endpoint
			if isHeader {
				broker = "broker"
			}
			if !isHeader || joined == nil {
				joined = fmt.Appendf(joined, "%s\t%s\n", bytes.TrimSuffix(line, []byte("\n")), broker)
			}
		}
	}
	return joined
}

func (t *requestTool) printTable(table []byte) error {
	if !isatty.IsTerminal(os.Stdout.Fd()) {
		_, err := os.Stdout.Write(table)
		return outputFailure(err)
	}
	columns := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	columns.Write(table)
	return outputFailure(columns.Flush())
}
