package main

// The suite and its runner are built from this module too; importing them here
// keeps what they need in go.mod and go.sum.
import (
	_ "github.com/onsi/ginkgo/v2/ginkgo"
	_ "k8s.io/kubernetes/test/e2e"
	_ "k8s.io/kubernetes/test/images/agnhost"
)
