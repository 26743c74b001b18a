package main

// The upstream suite is compiled from this module (`go test -c
// k8s.io/kubernetes/test/e2e`); importing it here keeps what it needs in go.mod
// and go.sum. The suite's runner and agnhost are `tool` lines in go.mod.
import _ "k8s.io/kubernetes/test/e2e"
