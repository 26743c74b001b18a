//! Vendored gRPC contracts and the modules generated from them; see README.md for their origin.
//!
//! Clients and servers of each service are generated. Nothing else belongs here: who speaks a
//! contract converts at its own edge.

mod secret;

/// Container Storage Interface.
pub mod csi {
    /// CSI 1.13.0, package `csi.v1`.
    #[allow(clippy::allow_attributes_without_reason, reason = "generated code")]
    #[allow(missing_debug_implementations, reason = "generated code")]
    #[allow(rustdoc::all, clippy::all, reason = "generated code")]
    pub mod v1 {
        tonic::include_proto!("csi.v1");
    }
}

/// How a plugin makes itself known to the kubelet through its plugin directory.
pub mod registration {
    /// `pluginregistration.v1` of Kubernetes 1.36; the wire package is called `pluginregistration`.
    #[allow(clippy::allow_attributes_without_reason, reason = "generated code")]
    #[allow(missing_debug_implementations, reason = "generated code")]
    #[allow(rustdoc::all, clippy::all, reason = "generated code")]
    pub mod v1 {
        tonic::include_proto!("pluginregistration");
    }
}
