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

// flagsOf returns the sorted flags of an applet, with their dashes.
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
	flags := map[string][]string{"backbone": {"-h"}}
	for _, match := range regexp.MustCompile(`(?m)^  backbone (--[a-z]+)`).FindAllStringSubmatch(backboneUsage, -1) {
		flags["backbone"] = append(flags["backbone"], match[1])
	}
	slices.Sort(flags["backbone"])
	for _, a := range applets() {
		flags[a.name] = flagsOf(t, a)
	}
	for name, flags := range flags {
		page, err := os.ReadFile("scripts/man/" + name + ".1")
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
		if !slices.Equal(flags, documented) {
			t.Errorf("the flags of %s are\n%q, but the man page has\n%q", name, flags, documented)
		}
	}
}

// TestUnitsRunTheToolsAsTheyAre checks what systemd would find out only when it runs a unit.
func TestUnitsRunTheToolsAsTheyAre(t *testing.T) {
	for unit, name := range map[string]string{"bbroker.service": "bbroker", "bservice@.service": "bservice"} {
		content, err := os.ReadFile("scripts/" + unit)
		if err != nil {
			t.Fatal(err)
		}
		setting := func(key string) []string {
			match := regexp.MustCompile(`(?m)^` + key + `=(.*)$`).FindSubmatch(content)
			if match == nil {
				t.Fatalf("%s does not set %s", unit, key)
			}
			return strings.Fields(string(match[1]))
		}
		// systemd looks for a program without a path where scripts/install and the .deb put it.
		if program := setting("ExecStart")[0]; program != name {
			t.Errorf("%s runs %s, not %s", unit, program, name)
		}
		if !slices.Contains(setting("RestartPreventExitStatus"), fmt.Sprint(exitUsage)) {
			t.Errorf("%s restarts after wrong usage", unit)
		}
		a := applets()[slices.IndexFunc(applets(), func(a applet) bool { return a.name == name })]
		text := regexp.MustCompile(`systemctl enable --now|backbone --keygen`).ReplaceAllString(string(content), "")
		for _, flag := range regexp.MustCompile(`--[a-z-]+`).FindAllString(text, -1) {
			if !slices.Contains(flagsOf(t, a), flag) {
				t.Errorf("%s names %s, which %s does not have", unit, flag, name)
			}
		}
		for _, variable := range regexp.MustCompile(`BACKBONE_[A-Z_]+`).FindAllString(text, -1) {
			if !regexp.MustCompile(`\b` + variable + `\b`).MatchString(a.usage) {
				t.Errorf("%s names %s, which %s does not read", unit, variable, name)
			}
		}
		var needed time.Duration
		for _, flag := range []string{"--grace", "--kill-after"} {
			if value := defaultsOf(a)[flag]; value != "" {
				d, err := time.ParseDuration(value)
				if err != nil {
					t.Fatal(err)
				}
				needed += d
			}
		}
		if limit, err := time.ParseDuration(setting("TimeoutStopSec")[0]); err != nil || limit <= needed {
			t.Errorf("%s gives %s %v to stop (%v), but it may take %v", unit, name, limit, err, needed)
		}
	}
}

// TestCompletionsKnowTheValuesOfFlags checks the values that --help does not list by themselves.
func TestCompletionsKnowTheValuesOfFlags(t *testing.T) {
	for _, file := range []string{"backbone.bash", "_backbone", "backbone.fish"} {
		content, err := os.ReadFile("scripts/completions/" + file)
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range applets() {
			for _, flag := range newParser(a.new()).Model.Flags {
				if values := strings.Join(flag.EnumSlice(), " "); !strings.Contains(string(content), values) {
					t.Errorf("%s does not know that --%s of %s takes one of %s", file, flag.Name, a.name, values)
				}
			}
		}
	}
}

// defaultsOf returns the default values of an applet by flag, as a user writes them.
func defaultsOf(a applet) map[string]string {
	defaults := map[string]string{"--host": defaultHost, "--port": defaultPort}
	if a.name == "brequest" {
		defaults["--jobs"], defaults["--timeout"] = fmt.Sprint(defaultJobs), strings.TrimSuffix(defaultTimeout.String(), "m0s")
	}
	for _, flag := range newParser(a.new()).Model.Flags {
		if flag.HasDefault {
			defaults["--"+flag.Name] = flag.Default
		}
	}
	return defaults
}

func TestHelpAndManPagesStateTheDefaults(t *testing.T) {
	helpFlags := regexp.MustCompile(`(?m)^ +((?:-\w|--[a-z-]+)(?:[ ,][^\n]*)?\n(?:     [^\n]*\n)*)`)
	for _, a := range applets() {
		help := map[string]string{}
		for _, entry := range helpFlags.FindAllString(a.usage, -1) {
			for _, flag := range regexp.MustCompile(`--[a-z-]+`).FindAllString(entry, -1) {
				if _, ok := help[flag]; !ok {
					help[flag] = strings.Join(strings.Fields(entry), " ")
				}
			}
		}
		page, err := os.ReadFile("scripts/man/" + a.name + ".1")
		if err != nil {
			t.Fatal(err)
		}
		for flag, value := range defaultsOf(a) {
			if !regexp.MustCompile(`[( ]` + regexp.QuoteMeta(value) + `[);]`).MatchString(help[flag]) {
				t.Errorf("%s %s: the default is %s, but the help has %q", a.name, flag, value, help[flag])
			}
			entry := regexp.MustCompile(`(?m)^\.It .*Fl -` + flag[2:] + `( .*)?\n(?:[^.].*\n|\.[^I].*\n)*`).FindString(string(page))
			if !strings.Contains(entry, "The default is "+value+".") && !strings.Contains(entry, "The default is "+value+",") && !strings.Contains(entry, "The default is "+value+":") {
				t.Errorf("%s %s: the default is %s, but the man page has %q", a.name, flag, value, entry)
			}
		}
	}
}

// TestREADMEStatesTheDefaults checks each "`--flag` (value)" and each row of the table of limits.
func TestREADMEStatesTheDefaults(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, match := range regexp.MustCompile("`(--[a-z-]+)` (?:\\(|\\| )([0-9][0-9a-zA-Z.]*)[ )]").FindAllStringSubmatch(string(readme), -1) {
		found++
		isDefault := func(a applet) bool { return defaultsOf(a)[match[1]] == match[2] }
		if !slices.ContainsFunc(applets(), isDefault) {
			t.Errorf("the README says that %s is the default of %s", match[2], match[1])
		}
	}
	if found < 10 {
		t.Errorf("found only %d defaults", found)
	}
}

func TestWorkedExamplesWork(t *testing.T) {
	examples := strings.Split(section(t, "README.md", "Worked examples"), "\n### ")[1:]
	examples = append(examples, strings.Split(section(t, "scripts/README.md", "More worked examples"), "\n### ")[1:]...)
	if len(examples) < 6 {
		t.Fatalf("found only %d examples", len(examples))
	}
	for _, example := range examples {
		title, text, _ := strings.Cut(example, "\n")
		t.Run(title, func(t *testing.T) {
			t.Parallel()
			if _, err := exec.LookPath("make"); err != nil && strings.Contains(text, "`Makefile`") {
				t.Skip("make is not installed")
			}
			runExample(t, text, os.Environ())
		})
	}
}

func TestFirstMinuteIsAsTheREADMEHasIt(t *testing.T) {
	_, text, found := strings.Cut(section(t, "README.md", "The first minute"), "    $ bbroker 2>bbroker.log &\n    tcp://127.0.0.1:5555\n")
	text, _, stops := strings.Cut(text, "    $ kill %1 %2\n")
	if !found || !stops {
		t.Fatal("the README does not start a broker, or does not stop it")
	}
	runExample(t, "`README.md`:\n\n    text\n\nThen:\n\n"+text, os.Environ())
}

func TestKeysWorkAsTheREADMEHasThem(t *testing.T) {
	text := strings.NewReplacer("0.0.0.0", "127.0.0.1", "6000", freePort(t)).Replace(section(t, "README.md", "Beyond one machine"))
	runExample(t, text, os.Environ())
}

func TestExamplesInPythonAndJavaScriptWork(t *testing.T) {
	// The commands of the examples run interpreters that have ZeroMQ.
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
	text := section(t, "scripts/README.md", "Python and JavaScript")
	runExample(t, strings.Replace(text, "\n    $ ", "\n    $ cp $LIBRARIES/backbone.* .\n    $ ", 1), env)
}

func TestStreamsWorkAsTheREADMEHasThem(t *testing.T) {
	_, text, found := strings.Cut(section(t, "README.md", "The tools"), "\n### Output as it comes\n")
	text, _, needsMore := strings.Cut(text, "\nA build, a backup")
	if !found || !needsMore {
		t.Fatal("the README has no section about streams")
	}
	runExample(t, text, os.Environ())
}

func TestSeveralBrokersWorkAsTheREADMEHasThem(t *testing.T) {
	_, text, found := strings.Cut(section(t, "README.md", "Operating a broker"), "\n### Several brokers\n")
	if !found {
		t.Fatal("the README has no section about several brokers")
	}
	text, _, _ = strings.Cut(text, "\nA service of one site") // several_clients.txtar tries this one.
	text = strings.NewReplacer("tcp://hub-1:5555", "ipc://nobody", "tcp://hub-2:5555", "tcp://127.0.0.1:5555").Replace(text)
	runExample(t, text, os.Environ())
}

// section returns the section of a file with the given title.
func section(t *testing.T, file, title string) string {
	t.Helper()
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	_, text, found := strings.Cut(string(content), "\n## "+title+"\n")
	if !found {
		t.Fatalf("%s has no section %q", file, title)
	}
	text, _, _ = strings.Cut(text, "\n## ")
	return text
}

// runExample runs an example of the documentation and checks its output. A block after a line with
// a file name is the content of that file. In the other blocks a line after a prompt is a command,
// and the lines that follow are its output.
func runExample(t *testing.T, text string, env []string) {
	s := newSystem(t, "--heartbeat", "1s")
	text = strings.ReplaceAll(text, "tcp://127.0.0.1:5555", s.endpoint)
	var script strings.Builder
	var want []string // the output of each command, after a line with its number
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

	if len(want) == 0 {
		t.Fatal("the example has no commands")
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
	syscall.Kill(group, syscall.SIGTERM) // ends what it left in the background
	s.expectNoProcess(func(pid int, _ string) bool { return pid == s.broker.Process.Pid })
	got, err := os.ReadFile(output.Name())
	got = regexp.MustCompile(`bbpub-[0-9a-f]{64}`).ReplaceAll(got, []byte("bbpub-…"))
	if err != nil || string(got) != strings.Join(want, "") {
		t.Errorf("it printed\n%s\n%v, want\n%s", got, err, strings.Join(want, ""))
	}
}

func TestHelpNamesEveryFlagAndNoOther(t *testing.T) {
	for _, a := range applets() {
		t.Run(a.name, func(t *testing.T) {
			flags := flagsOf(t, a)
			// A line that documents flags starts with them. The lines of the examples do not.
			var documented []string
			for line := range strings.Lines(a.usage) {
				if strings.HasPrefix(strings.TrimLeft(line, " "), "-") {
					spec, _, _ := strings.Cut(strings.TrimLeft(line, " "), "  ")
					documented = append(documented, regexp.MustCompile(`--?[a-z0-9][a-z-]*`).FindAllString(spec, -1)...)
				}
			}
			slices.Sort(documented)
			if !slices.Equal(flags, documented) {
				t.Errorf("the flags are\n%q, but the help has\n%q", flags, documented)
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
				t.Errorf("%s --help has a line of %d bytes: %s", a.name, len(line), line)
			}
		}
	}
}
