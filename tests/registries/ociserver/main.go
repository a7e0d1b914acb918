// Command ociserver serves an OCI registry from memory, for the tests: another implementation than distribution's, with
// the referrers API, and mounting that fails where there is nothing to mount.
package main

import (
	"flag"
	"log"
	"net/http"
	"time"

	"cuelabs.dev/go/oci/ociregistry/ocimem"
	"cuelabs.dev/go/oci/ociregistry/ociserver"
)

func main() {
	address := flag.String("address", "127.0.0.1:0", "where to listen")
	certificate := flag.String("certificate", "", "PEM file of a certificate; without one there is no TLS")
	key := flag.String("key", "", "PEM file of its key")
	flag.Parse()

	server := &http.Server{
		Addr:              *address,
		Handler:           ociserver.New(ocimem.New(), nil),
		ReadHeaderTimeout: 10 * time.Second,
	}
	if *certificate != "" {
		log.Fatal(server.ListenAndServeTLS(*certificate, *key))
	}
	log.Fatal(server.ListenAndServe())
}
