// Judge of ocicrypt: the reference implementation on one layer, for tests.
//
//	judge encrypt RECIPIENT...       plain layer on standard input; {"annotations", "blob"} as JSON on standard output
//	judge decrypt KEY...             {"annotations", "blob"} on standard input; the plain layer on standard output
//	judge add RECIPIENT KEY          {"annotations", "blob"} in, the same with one recipient more out
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"

	"github.com/containers/ocicrypt"
	"github.com/containers/ocicrypt/config"
	"github.com/containers/ocicrypt/helpers"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

type layer struct {
	Annotations map[string]string `json:"annotations"`
	Blob        []byte            `json:"blob"`
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func read() layer {
	var one layer
	check(json.NewDecoder(os.Stdin).Decode(&one))
	return one
}

func decryptConfig(keys []string) *config.DecryptConfig {
	crypto, err := helpers.CreateDecryptCryptoConfig(keys, nil)
	check(err)
	return crypto.DecryptConfig
}

func encryptConfig(recipients []string, keys []string) *config.EncryptConfig {
	crypto, err := helpers.CreateCryptoConfig(recipients, keys)
	check(err)
	return crypto.EncryptConfig
}

func main() {
	switch os.Args[1] {
	case "encrypt":
		plain, err := io.ReadAll(os.Stdin)
		check(err)
		reader, finalize, err := ocicrypt.EncryptLayer(encryptConfig(os.Args[2:], nil), bytes.NewReader(plain), ocispec.Descriptor{})
		check(err)
		blob, err := io.ReadAll(reader)
		check(err)
		annotations, err := finalize()
		check(err)
		check(json.NewEncoder(os.Stdout).Encode(layer{annotations, blob}))
	case "add":
		one := read()
		_, finalize, err := ocicrypt.EncryptLayer(encryptConfig(os.Args[2:3], os.Args[3:]), nil, ocispec.Descriptor{Annotations: one.Annotations})
		check(err)
		annotations, err := finalize()
		check(err)
		for name, value := range annotations {
			one.Annotations[name] = value
		}
		check(json.NewEncoder(os.Stdout).Encode(one))
	case "decrypt":
		one := read()
		reader, _, err := ocicrypt.DecryptLayer(decryptConfig(os.Args[2:]), bytes.NewReader(one.Blob), ocispec.Descriptor{Annotations: one.Annotations}, false)
		check(err)
		plain, err := io.ReadAll(reader)
		check(err)
		_, err = os.Stdout.Write(plain)
		check(err)
	}
}
