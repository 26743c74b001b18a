//! The kernel thread against real kernels: "nodes" are network namespaces on one bridge, pods are
//! others, made by the plugin itself. Needs root; every test has namespaces of its own.

mod heal;
mod lab;
mod large;
mod life;
