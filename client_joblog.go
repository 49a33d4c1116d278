package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
)

// A jobLog is a file with a line for each request of a batch that ended and whose output was
// written, so that one that ended with status 0 need not be made again.
type jobLog struct {
	file    *os.File // nil to log nothing
	service string
	pending bytes.Buffer   // lines of requests whose output may not be written yet
	done    map[string]int // lines of input to skip, and how often
}

const jobLogHeader = "number\tstart\tseconds\tstatus\tbytes\tservice\tinput\n"

// jobLogEscaper keeps text in one field of one line.
var jobLogEscaper = strings.NewReplacer("\\", "\\\\", "\t", "\\t", "\n", "\\n")

// openJobLog begins a new log of requests to a service, or continues the one that exists. It leaves a
// file alone that is not a job log, or is in use.
func openJobLog(path, service string, resume bool) (*jobLog, error) {
	l := &jobLog{service: jobLogEscaper.Replace(service), done: map[string]int{}}
	if path == "" {
		return l, nil
	}
	if path == "-" {
		return nil, misuse("--joblog FILE", "--joblog -: the replies go to standard output; use a FILE")
	}
	access := os.O_RDWR | os.O_CREATE
	if info, err := os.Stat(path); err == nil && !info.Mode().IsRegular() {
		access = os.O_WRONLY // A pipe would not end with its reader.
	}
	file, err := os.OpenFile(path, access, 0o666)
	if err != nil {
		return nil, misuse("FILE must be writable", "--joblog: %w", err)
	}
	l.file = file
	length := int64(0)
	info, err := file.Stat()
	if stdout, stdoutErr := os.Stdout.Stat(); err == nil && stdoutErr == nil && info.Mode().IsRegular() && os.SameFile(info, stdout) {
		err = misuse("use another FILE", "%s is the standard output", path)
	}
	if err == nil && info.Mode().IsRegular() {
		if length, err = l.load(resume); err == nil {
			_, err = file.Seek(length, io.SeekStart)
			err = errors.Join(file.Truncate(length), err)
		}
	}
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("--joblog: %w", err)
	}
	if length == 0 {
		l.pending.WriteString(jobLogHeader)
	}
	return l, nil
}

// load locks the log, reads which lines are done, and returns the length of what to keep. It drops a
// last line that is incomplete.
func (l *jobLog) load(resume bool) (length int64, err error) {
	name := l.file.Name()
	if err := syscall.Flock(int(l.file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); errors.Is(err, syscall.EWOULDBLOCK) {
		return 0, &failure{status: exitTemporary, err: fmt.Errorf("%s is in use by another batch", name)}
	}
	r := bufio.NewReader(l.file)
	header, err := r.ReadString('\n')
	switch {
	case err == io.EOF && strings.HasPrefix(jobLogHeader, header):
		return 0, nil
	case err != nil && err != io.EOF:
		return 0, err
	case header != jobLogHeader:
		return 0, misuse("use another FILE", "%s exists and is not a job log", name)
	case !resume:
		return 0, nil
	}
	length = int64(len(header))
	for {
		text, err := r.ReadString('\n')
		if err == io.EOF {
			return length, nil
		}
		if err != nil {
			return 0, err
		}
		length += int64(len(text))
		fields := strings.SplitN(strings.TrimSuffix(text, "\n"), "\t", 7)
		switch {
		case len(fields) < 7:
		case fields[5] != l.service:
			return 0, misuse("use another FILE", "%s is the log of the service %s, not of %s", name, fields[5], l.service)
		case fields[3] == "0":
			l.done[fields[6]]++
		}
	}
}

// skip tells whether a line of input need not be done again, once for each time that it was done.
func (l *jobLog) skip(line []byte) bool {
	if len(l.done) == 0 {
		return false
	}
	input := jobLogEscaper.Replace(string(line))
	if l.done[input] == 0 {
		return false
	}
	l.done[input]--
	return true
}

// add logs a request that ended, once flush is called.
func (l *jobLog) add(it *item) {
	if l.file != nil {
		fmt.Fprintf(&l.pending, "%d\t%.3f\t%.3f\t%d\t%d\t%s\t%s\n", it.number, float64(it.begin.UnixMicro())/1e6,
			it.took.Seconds(), it.call.status(), sizeOf(it.call.reply.Output), l.service, jobLogEscaper.Replace(string(it.line)))
	}
}

// flush writes what was added. The output of these requests must be written before.
func (l *jobLog) flush() error {
	if l.file == nil {
		return nil
	}
	_, err := l.pending.WriteTo(l.file)
	return err
}
