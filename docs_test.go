package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// What is said of the tools elsewhere is as true as their --help.

// flagsOf are the flags of an applet, as one writes them.
func flagsOf(t *testing.T, a applet) []string {
	t.Helper()
	parser := newParser(a.new())
	var flags []string
	for _, flag := range parser.Model.Flags {
		flags = append(flags, "--"+flag.Name)
		if flag.Short != 0 {
			flags = append(flags, fmt.Sprintf("-%c", flag.Short))
		}
	}
	slices.Sort(flags)
	return flags
}

func TestManPagesNameEveryFlagAndNoOther(t *testing.T) {
	for _, a := range applets() {
		page, err := os.ReadFile("scripts/man/" + a.name + ".1")
		if err != nil {
			t.Fatal(err)
		}
		var documented []string
		for line := range strings.Lines(string(page)) {
			if strings.HasPrefix(line, ".It Fl ") {
				for _, match := range regexp.MustCompile(`Fl (-?[a-z0-9][a-z-]*)`).FindAllStringSubmatch(line, -1) {
					documented = append(documented, "-"+match[1])
				}
			}
		}
		slices.Sort(documented)
		if flags := flagsOf(t, a); !slices.Equal(flags, documented) {
			t.Errorf("the flags of %s are\n%q, the man page has\n%q", a.name, flags, documented)
		}
	}
}

func TestWorkedExamplesWork(t *testing.T) {
	examples := strings.Split(readmeSection(t, "Worked examples"), "\n### ")[1:]
	if len(examples) < 6 {
		t.Fatalf("there are only %d of them", len(examples))
	}
	for _, example := range examples {
		title, text, _ := strings.Cut(example, "\n")
		t.Run(title, func(t *testing.T) {
			if _, err := exec.LookPath("make"); err != nil && strings.Contains(text, "`Makefile`") {
				t.Skip("there is no make")
			}
			workExample(t, text, os.Environ())
		})
	}
}

func TestExamplesInPythonAndJavaScriptWork(t *testing.T) {
	// The interpreters are those that have ZeroMQ.
	bin := t.TempDir()
	for name, language := range map[string]string{"python3": "python", "node": "javascript"} {
		path, err := exec.LookPath(interpreter(t, language))
		if err == nil {
			err = os.WriteFile(filepath.Join(bin, name), fmt.Appendf(nil, "#!/bin/sh\nexec %s \"$@\"\n", path), 0o700)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	root, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	env := append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"), "LIBRARIES="+root+"/scripts",
		"NODE_PATH="+root+"/scripts/node_modules", "PYTHONDONTWRITEBYTECODE=1")
	text := readmeSection(t, "From Python and JavaScript")
	workExample(t, strings.Replace(text, "\n    $ ", "\n    $ cp $LIBRARIES/backbone.* .\n    $ ", 1), env)
}

// readmeSection is what the README has under a heading.
func readmeSection(t *testing.T, title string) string {
	t.Helper()
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, found := strings.Cut(string(readme), "\n## "+title+"\n")
	if !found {
		t.Fatalf("the README has no section %q", title)
	}
	section, _, _ = strings.Cut(section, "\n## ")
	return section
}

// workExample does what an example of the README says: it writes the files that are
// there, after their name in a line of its own, and types in what follows a prompt.
func workExample(t *testing.T, text string, env []string) {
	s := newSite(t, "--heartbeat", "1s")
	var script strings.Builder
	var want []string // what each command prints, after a line that tells its number
	name := ""
	for _, paragraph := range regexp.MustCompile("(?m)^`(.+)`:\n\n|(?:^    .*\n|^\t.*\n|^\n    .*\n)+").FindAllStringSubmatch(text, -1) {
		if paragraph[1] != "" {
			name = paragraph[1]
			continue
		}
		block := strings.ReplaceAll(strings.Trim(paragraph[0], "\n")+"\n", "\n    ", "\n")
		block = strings.TrimPrefix(block, "    ")
		if name != "" {
			if err := os.WriteFile(filepath.Join(s.dir, name), []byte(block), 0o600); err != nil {
				t.Fatal(err)
			}
			name = ""
			continue
		}
		for line := range strings.Lines(block) {
			if command, ok := strings.CutPrefix(line, "$ "); ok {
				fmt.Fprintf(&script, "echo command %d\n%s", len(want), command)
				want = append(want, fmt.Sprintf("command %d\n", len(want)))
			} else {
				want[len(want)-1] += line
			}
		}
	}

	output := fileWith(t, "")
	shell := exec.Command("sh")
	shell.Dir, shell.Env = s.dir, append(env, "BACKBONE_BROKER="+s.endpoint, "GORACE=atexit_sleep_ms=0")
	shell.Stdin, shell.Stdout, shell.Stderr = strings.NewReader(script.String()), output, output
	shell.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := shell.Start(); err != nil {
		t.Fatal(err)
	}
	group := -shell.Process.Pid
	timer := time.AfterFunc(time.Minute, func() { syscall.Kill(group, syscall.SIGKILL) })
	defer timer.Stop()
	shell.Wait()
	syscall.Kill(group, syscall.SIGTERM) // what it left in the background
	s.expectNoProcess(func(pid int, _ string) bool { return pid == s.broker.Process.Pid })
	got, err := os.ReadFile(output.Name())
	if err != nil || string(got) != strings.Join(want, "") {
		t.Errorf("it prints\n%s\n%v, instead of\n%s", got, err, strings.Join(want, ""))
	}
}

func TestHelpNamesEveryFlagAndNoOther(t *testing.T) {
	for _, a := range applets() {
		t.Run(a.name, func(t *testing.T) {
			flags := flagsOf(t, a)
			// A line that documents flags starts with them; the examples do not.
			var documented []string
			for line := range strings.Lines(a.usage) {
				if strings.HasPrefix(strings.TrimLeft(line, " "), "-") {
					spec, _, _ := strings.Cut(strings.TrimLeft(line, " "), "  ")
					documented = append(documented, regexp.MustCompile(`--?[a-z0-9][a-z-]*`).FindAllString(spec, -1)...)
				}
			}
			slices.Sort(documented)
			if !slices.Equal(flags, documented) {
				t.Errorf("the flags are\n%q, the help has\n%q", flags, documented)
			}
		})
	}
}

func TestHelpFitsTwoScreens(t *testing.T) {
	for _, a := range applets() {
		lines := strings.Split(a.usage, "\n")
		if len(lines) > 64 {
			t.Errorf("%s --help has %d lines", a.name, len(lines))
		}
		for _, line := range lines {
			if len(line) > 88 {
				t.Errorf("%s --help has a line of %d: %s", a.name, len(line), line)
			}
		}
	}
}
