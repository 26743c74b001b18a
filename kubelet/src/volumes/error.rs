//! Why volumes cannot be had, in the words of the stock kubelet's events.

use std::fmt;

/// A step on the way of a PersistentVolume into a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The volume is for other nodes.
    NodeAffinity,
    /// Looking for what is to be mounted.
    NewMounter,
    /// Waiting for its controller.
    WaitForAttach,
    /// Staging.
    MountDevice,
    /// Publishing.
    SetUp,
    /// Growing.
    Expand,
    /// A device for other nodes.
    MapNodeAffinity,
    /// Waiting for a device's controller.
    MapWaitForAttach,
    /// Staging a device.
    MapSetUpDevice,
    /// Publishing a device.
    MapPodDevice,
}

impl Step {
    fn reason(self) -> &'static str {
        match self {
            Self::NodeAffinity
            | Self::NewMounter
            | Self::WaitForAttach
            | Self::MountDevice
            | Self::SetUp
            | Self::Expand
            | Self::MapNodeAffinity => "FailedMount",
            Self::MapWaitForAttach | Self::MapSetUpDevice | Self::MapPodDevice => "FailedMapVolume",
        }
    }
}

impl fmt::Display for Step {
    /// As events of the stock kubelet begin.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NodeAffinity => "MountVolume.NodeAffinity check failed",
            Self::NewMounter => "MountVolume.NewMounter initialization failed",
            Self::WaitForAttach => "MountVolume.WaitForAttach failed",
            Self::MountDevice => "MountVolume.MountDevice failed",
            Self::SetUp => "MountVolume.SetUp failed",
            Self::Expand => "MountVolume.Setup failed while expanding volume",
            Self::MapNodeAffinity => "MapVolume.NodeAffinity check failed",
            Self::MapWaitForAttach => "MapVolume.WaitForAttach failed",
            Self::MapSetUpDevice => "MapVolume.SetUpDevice failed",
            Self::MapPodDevice => "MapVolume.MapPodDevice failed",
        })
    }
}

/// Why a pod's volumes cannot be had, or not be removed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VolumeError {
    /// One volume of the pod; trying again later may help.
    #[error("MountVolume.SetUp failed for volume {volume:?} : {message}")]
    SetUp {
        /// Its name in the pod.
        volume: String,
        /// Why.
        message: String,
    },
    /// A step of one volume; trying again later may help.
    #[error("{what} for volume {volume:?} : {message}")]
    Failed {
        /// The step.
        what: Step,
        /// Name of the PersistentVolume, or of the volume in the pod.
        volume: String,
        /// Why.
        message: String,
    },
    /// Others have to do something first: bind a claim, attach a volume.
    #[error(
        "Unable to attach or mount volumes: unmounted volumes=[{}], unattached volumes=[{}], failed to process volumes=[{}]: {message}",
        unmounted.join(" "), unattached.join(" "), unprocessed.join(" ")
    )]
    Unready {
        /// Volumes of the pod that are missing, by their names there.
        unmounted: Vec<String>,
        /// Of these, which are not attached.
        unattached: Vec<String>,
        /// Of these, which are not known well enough.
        unprocessed: Vec<String>,
        /// Why.
        message: String,
    },
    /// What the pod left could not be removed.
    #[error("cannot remove the volumes of pod {uid}: {message}")]
    Teardown {
        /// The pod's UID.
        uid: String,
        /// Why.
        message: String,
    },
    /// The node's own directories.
    #[error("volume directories of the node: {message}")]
    Node {
        /// Why.
        message: String,
    },
}

impl VolumeError {
    /// Reason of the event users see.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::SetUp { .. } | Self::Node { .. } | Self::Unready { .. } => "FailedMount",
            Self::Failed { what, .. } => what.reason(),
            Self::Teardown { .. } => "FailedUnMount",
        }
    }

    pub(crate) fn set_up(volume: &str, message: impl Into<String>) -> Self {
        Self::SetUp {
            volume: volume.to_owned(),
            message: message.into(),
        }
    }

    /// A volume of the pod of which too little is known.
    pub(crate) fn unprocessed(volume: &str, message: impl Into<String>) -> Self {
        Self::Unready {
            unmounted: vec![volume.to_owned()],
            unattached: vec![],
            unprocessed: vec![volume.to_owned()],
            message: message.into(),
        }
    }

    /// A volume of the pod that is not attached.
    pub(crate) fn unattached(volume: &str, message: impl Into<String>) -> Self {
        Self::Unready {
            unmounted: vec![volume.to_owned()],
            unattached: vec![volume.to_owned()],
            unprocessed: vec![],
            message: message.into(),
        }
    }
}
