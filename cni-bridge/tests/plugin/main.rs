//! The built plugin against the kernel, as a runtime calls it. Needs root; every test has network
//! namespaces of its own and leaves nothing.

mod kills;
mod lab;
mod verbs;
