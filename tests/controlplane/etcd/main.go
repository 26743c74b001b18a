// Command etcd is the unmodified etcd server. It is a module of its own
// because its dependencies need not agree with those of Kubernetes.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() { etcdmain.Main(os.Args) }
