//! Volumes that are devices: staged and published as files, reached by a link in the pod's
//! directory.

use super::mount::{Job, make_dirs, pod_record};
use super::request::{Form, map, pod_info, pod_info_wanted};
use super::world::Stage;
use super::{Inner, blocking, failed, text};
use crate::events::EventType;
use crate::launch::pod_uid;
use crate::volumes::{Step, VolumeError};
use proto::csi::v1 as csi;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

impl Inner {
    /// Stages and publishes a device; the path of the link that leads to it.
    pub(super) async fn map_device(
        &self,
        job: Job<'_>,
        stage: &mut Stage,
    ) -> Result<PathBuf, VolumeError> {
        let name = job.bound.name();
        let uid = pod_uid(job.wanted.pod);
        let fail = |step: Step| move |e: String| failed(step, name, e);
        let data = pod_record(&job.volume.id, name, &self.node_name, false);
        let (staging, map_path) = (self.paths.block_staging(name), self.paths.block_map(name));
        let (data_dir, staging_dir) = (self.paths.block_data(name), staging.clone());
        let made_map = map_path.clone();
        let made = blocking(move || {
            data.save(&data_dir)?;
            make_dirs(&made_map)?;
            make_dirs(&staging_dir)
        });
        made.await.map_err(fail(Step::MapSetUpDevice))?;
        if job.capabilities.stage {
            if *stage != Stage::Staged {
                *stage = Stage::Unknown;
                self.stage_device(&job, text(&staging)).await?;
                *stage = Stage::Staged;
            }
        } else {
            *stage = Stage::Gone;
        }
        let target = self.paths.block_publish(name).join(uid);
        let link = self.paths.pod_devices(uid).join(name);
        let (to, at) = (target.clone(), link.clone());
        let recorded = blocking(move || {
            // The link is the record of the pod's use.
            make_dirs(to.parent().unwrap_or(&to))?;
            make_dirs(at.parent().unwrap_or(&at))?;
            match symlink(&to, &at) {
                Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
                    Err(format!("link {}: {e}", at.display()))
                }
                Ok(()) | Err(_) => Ok(()),
            }
        });
        recorded.await.map_err(fail(Step::MapPodDevice))?;
        self.publish_device(&job, text(&staging), text(&target))
            .await?;
        if !job.wanted.again {
            for (what, path) in [
                ("globalMapPath", &map_path),
                ("volumeMapPath", &self.paths.pod_devices(uid)),
            ] {
                let message =
                    format!("MapVolume.MapPodDevice succeeded for volume {name:?} {what} {path:?}");
                let normal = EventType::Normal;
                self.events.pod_event(
                    job.wanted.pod,
                    None,
                    normal,
                    "SuccessfulMountVolume",
                    message,
                );
            }
        }
        Ok(link)
    }

    async fn stage_device(&self, job: &Job<'_>, staging: String) -> Result<(), VolumeError> {
        let name = job.bound.name();
        let fail = |e: String| failed(Step::MapSetUpDevice, name, e);
        let secret = job.source.node_stage_secret_ref.as_ref();
        let secrets = self.referred("NodeStageSecretRef", secret).await;
        let request = csi::NodeStageVolumeRequest {
            volume_id: job.source.volume_handle.clone(),
            publish_context: job.context.clone(),
            staging_target_path: staging,
            volume_capability: Some(job.capability(Form::Block)),
            secrets: secrets.map_err(fail)?,
            volume_context: map(job.source.volume_attributes.as_ref()),
        };
        let staged = job.driver.stage(request).await;
        staged.map_err(|e| fail(e.to_string()))
    }

    async fn publish_device(
        &self,
        job: &Job<'_>,
        staging: String,
        target: String,
    ) -> Result<(), VolumeError> {
        let name = job.bound.name();
        let fail = |e: String| failed(Step::MapPodDevice, name, e);
        let secret = job.source.node_publish_secret_ref.as_ref();
        let secrets = self.referred("NodePublishSecretRef", secret).await;
        let mut attributes = map(job.source.volume_attributes.as_ref());
        if pod_info_wanted(job.object) {
            attributes.extend(pod_info(job.wanted.pod, false));
        }
        let request = csi::NodePublishVolumeRequest {
            volume_id: job.source.volume_handle.clone(),
            publish_context: job.context.clone(),
            staging_target_path: staging,
            target_path: target,
            volume_capability: Some(job.capability(Form::Block)),
            readonly: job.bound.readonly,
            secrets: secrets.map_err(fail)?,
            volume_context: attributes,
        };
        let published = job.driver.publish(request).await;
        published.map_err(|e| fail(e.to_string()))
    }
}
