// Flannel's own VXLAN and host-gw back ends with its kube subnet manager: a peer for tests of
// migration and a rival in measurements. The whole of flannel does not build without modules of
// cloud providers; what is here is what its own main does for these back ends.
package main

import (
	"context"
	"flag"
	"log"
	"os/signal"
	"sync"
	"syscall"

	"github.com/flannel-io/flannel/pkg/backend"
	_ "github.com/flannel-io/flannel/pkg/backend/hostgw"
	_ "github.com/flannel-io/flannel/pkg/backend/vxlan"
	"github.com/flannel-io/flannel/pkg/ipmatch"
	"github.com/flannel-io/flannel/pkg/subnet/kube"
)

func main() {
	kubeconfig := flag.String("kubeconfig-file", "", "kubeconfig")
	netConf := flag.String("net-config-path", "", "net-conf.json")
	iface := flag.String("iface", "eth0", "interface the peers are reached by")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()

	// The node's name comes from NODE_NAME.
	manager, err := kube.NewSubnetManager(ctx, "", *kubeconfig, "flannel.alpha.coreos.com", *netConf, false)
	if err != nil {
		log.Fatalf("make the subnet manager: %v", err)
	}
	config, err := manager.GetNetworkConfig(ctx)
	if err != nil {
		log.Fatalf("read the network configuration: %v", err)
	}
	families, err := ipmatch.GetIPFamily(config.EnableIPv4, config.EnableIPv6)
	if err != nil {
		log.Fatalf("find the families: %v", err)
	}
	external, err := ipmatch.LookupExtIface(*iface, "", "", families, ipmatch.PublicIPOpts{})
	if err != nil {
		log.Fatalf("find interface %s: %v", *iface, err)
	}
	be, err := backend.NewManager(ctx, manager, external).GetBackend(config.BackendType)
	if err != nil {
		log.Fatalf("make the back end: %v", err)
	}
	var group sync.WaitGroup
	network, err := be.RegisterNetwork(ctx, &group, config)
	if err != nil {
		log.Fatalf("register the network: %v", err)
	}
	log.Printf("flannel keeps %v with MTU %d", network.Lease().Subnet, network.MTU())
	group.Add(1)
	go func() {
		defer group.Done()
		network.Run(ctx)
	}()
	go manager.CompleteLease(ctx, network.Lease(), &group)
	<-ctx.Done()
	group.Wait()
}
