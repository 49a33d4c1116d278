package main

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"syscall"

	zmq "github.com/pebbe/zmq4"
)

// The keys of CURVE, by which peers on TCP endpoints know each other. As text a key is a prefix and 64
// hexadecimal digits: nothing that a shell must quote, and a secret key is not mistaken for a public one.
// Public keys of other tools may come in Z85, which has 40 characters.
type (
	publicKey [keyLength]byte
	secretKey [keyLength]byte
)

const (
	keyLength    = 32 // bytes
	z85Length    = 40
	publicPrefix = "bbpub-"
	secretPrefix = "bbsec-"
)

func (k publicKey) String() string { return publicPrefix + hex.EncodeToString(k[:]) }

func (k publicKey) z85() string { return zmq.Z85encode(string(k[:])) }

// String keeps a secret key out of logs and errors.
func (k secretKey) String() string { return secretPrefix + "..." }

func (k secretKey) z85() string { return zmq.Z85encode(string(k[:])) }

func (k secretKey) public() (publicKey, error) {
	text, err := zmq.AuthCurvePublic(k.z85())
	if err != nil {
		return publicKey{}, errNoCurve
	}
	return publicKey([]byte(zmq.Z85decode(text))), nil
}

var errNoCurve = &failure{status: exitUnavailable, err: errors.New("this libzmq has no CURVE, which keys need"),
	hint: "the binary of scripts/release has it"}

var errSecretKey = errors.New("that is a secret key, which nobody else may see; a public key is wanted")

// parsePublicKey parses a public key, in our form or in Z85.
func parsePublicKey(text string) (publicKey, error) {
	digits, ours := strings.CutPrefix(text, publicPrefix)
	raw, err := hex.DecodeString(digits)
	switch {
	case ours && err == nil && len(raw) == keyLength:
		return publicKey(raw), nil
	case strings.Contains(text, secretPrefix):
		return publicKey{}, errSecretKey
	case !ours && len(text) == z85Length:
		// libzmq's decoder does not reject bad Z85; only the round trip shows it.
		if raw := zmq.Z85decode(text); zmq.Z85encode(raw) == text {
			return publicKey([]byte(raw)), nil
		}
	}
	return publicKey{}, fmt.Errorf("%.80q is not a public key (%s and 64 hexadecimal digits)", text, publicPrefix)
}

// parseSecretKey returns the secret key in the content of a file: its only line that is not empty or
// a comment. Errors do not show the content.
func parseSecretKey(content []byte) (*secretKey, error) {
	var key *secretKey
	for line := range bytes.Lines(content) {
		text := strings.TrimSpace(string(line))
		if text == "" || text[0] == '#' {
			continue
		}
		digits, ok := strings.CutPrefix(text, secretPrefix)
		raw, err := hex.DecodeString(digits)
		switch {
		case strings.HasPrefix(text, publicPrefix):
			return nil, errors.New("that is a public key; a secret key is wanted")
		case !ok || err != nil || len(raw) != keyLength || key != nil:
			return nil, fmt.Errorf("not a file with one secret key (%s and 64 hexadecimal digits)", secretPrefix)
		}
		key = (*secretKey)(raw)
	}
	if key == nil {
		return nil, errors.New("the file has no secret key")
	}
	return key, nil
}

const maxKeyFile = 64 << 10 // bytes

// readSecretKey reads a secret key from a file that nobody else may read. source is the flag or the
// variable that names it.
func readSecretKey(path, source string) (*secretKey, error) {
	file, err := os.Open(path)
	switch {
	case err != nil && (strings.Contains(path, secretPrefix) || strings.HasPrefix(path, publicPrefix)):
		return nil, misuse("backbone --keygen FILE makes one", "%s has a key; the name of a file is wanted", source) // without the key
	case err != nil:
		return nil, misuse("check the name; backbone --keygen FILE makes a key", "%s: %w", source, err)
	}
	defer file.Close()
	content, err := io.ReadAll(io.LimitReader(file, maxKeyFile))
	if err != nil {
		return nil, misuse("give the file that backbone --keygen made", "%s: %w", source, err)
	}
	key, err := parseSecretKey(content)
	if err != nil {
		return nil, misuse("give the file that backbone --keygen made", "%s: %s: %w", source, path, err)
	}
	info, err := file.Stat()
	if err != nil {
		return nil, misuse("", "%s: %w", source, err)
	}
	if readableByOthers(info) {
		return nil, misuse("chmod 600 "+path, "%s: %s has mode %04o: others may read it", source, path, info.Mode().Perm())
	}
	return key, nil
}

// readableByOthers tells whether a file can be read by others than its owner and this process. A file of
// somebody else, as a credential of systemd is, may be there for the group of this process.
func readableByOthers(info fs.FileInfo) bool {
	own := info.Sys().(*syscall.Stat_t).Uid == uint32(os.Geteuid())
	forbidden := fs.FileMode(0o007)
	if own {
		forbidden = 0o077
	}
	return info.Mode().IsRegular() && info.Mode().Perm()&forbidden != 0
}

// keygen makes a secret key in a new file that only its owner may read, and prints the public key.
func keygen(path string) error {
	_, text, err := zmq.NewCurveKeypair()
	if err != nil {
		return errNoCurve
	}
	secret := secretKey([]byte(zmq.Z85decode(text)))
	public, err := secret.public()
	if err != nil {
		return err
	}
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return misuse("use another FILE; backbone --pubkey <"+path+" prints its public key", "--keygen: %s exists, and is not overwritten", path)
	}
	if err != nil {
		return fmt.Errorf("--keygen: %w", err)
	}
	_, err = fmt.Fprintf(file, "# public key: %v\n%s%s\n", public, secretPrefix, hex.EncodeToString(secret[:]))
	if err = errors.Join(err, file.Sync(), file.Close()); err != nil {
		return &failure{status: exitIO, err: errors.Join(err, os.Remove(path))}
	}
	return printOutput(public.String() + "\n")
}

// pubkey prints the public key of the secret key on standard input.
func pubkey() error {
	content, err := io.ReadAll(io.LimitReader(os.Stdin, maxKeyFile))
	if err != nil {
		return inputFailure(err)
	}
	secret, err := parseSecretKey(content)
	if err != nil {
		return misuse("backbone --pubkey <FILE", "--pubkey: %w", err)
	}
	public, err := secret.public()
	if err != nil {
		return err
	}
	return printOutput(public.String() + "\n")
}

// linkKeys are the keys for a connection to a broker.
type linkKeys struct {
	broker publicKey
	own    *secretKey // nil for a new one for each connection
}

// String keeps the secret key out of logs and errors.
func (k linkKeys) String() string { return "keys for " + k.broker.String() }

// set makes a socket use the keys for the connections that it makes from now on.
func (k *linkKeys) set(s *socket) error {
	var public, secret string
	var err error
	if k.own == nil {
		public, secret, err = zmq.NewCurveKeypair()
	} else {
		var own publicKey
		own, err = k.own.public()
		public, secret = own.z85(), k.own.z85()
	}
	if err != nil {
		return errNoCurve
	}
	return errors.Join(s.SetCurveServerkey(k.broker.z85()), s.SetCurvePublickey(public), s.SetCurveSecretkey(secret))
}
