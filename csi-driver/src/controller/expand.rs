//! ControllerExpandVolume and ControllerModifyVolume: promises that the node then keeps.

use crate::backend::{attach, image};
use crate::driver::{Driver, check_name};
use crate::error::DriverError;
use crate::model::{CapacityRange, Kind, VolumeId};
use crate::parameters::{self, Map};
use crate::plan;
use crate::store::VolumeRecord;

impl Driver {
    /// Promises a volume more room. The new size, and whether the node still has to do something.
    ///
    /// A volume of another node is taken at its word: whoever leads among the resizers asks his
    /// own node's driver, and the node that has the volume decides when it grows it.
    ///
    /// # Errors
    /// [`DriverError::OutOfRange`] for less than it has, [`DriverError::NoRoom`].
    pub fn expand_controller(
        &self,
        id: &str,
        range: Option<CapacityRange>,
    ) -> Result<(u64, bool), DriverError> {
        check_name("the volume's id", id)?;
        let range = range.ok_or_else(|| DriverError::invalid("the capacity range is missing"))?;
        if let Some(id) = VolumeId::parse(id)
            && !id.is_of(&self.tag)
            && self.store.volumes.get(id.as_str()).is_none()
        {
            return Ok((plan::choose_size(range, plan::GRAIN_BYTES)?, true));
        }
        let volume = self.volume(id)?;
        let _guard = self.locks.take([&volume.id])?;
        let volume = self.promise(self.volume(id)?, range)?;
        Ok((volume.capacity_bytes, volume.kind != Kind::Directory))
    }

    /// Writes down that a volume shall have at least so much; one that has keeps what it has.
    pub(crate) fn promise(
        &self,
        mut volume: VolumeRecord,
        range: CapacityRange,
    ) -> Result<VolumeRecord, DriverError> {
        let has = volume.capacity_bytes;
        if let Some(limit) = range.limit
            && limit < has
        {
            return Err(DriverError::OutOfRange {
                what: format!("the volume has {has} bytes and does not shrink to {limit}"),
            });
        }
        if range.required <= has {
            return Ok(volume);
        }
        volume.capacity_bytes = plan::choose_size(range, volume.kind.min_bytes())?;
        let more = volume.capacity_bytes - has;
        self.pool
            .take_room(&self.store, volume.provision, more, || {
                self.store.volumes.put(volume.clone())
            })?;
        Ok(volume)
    }

    /// Changes what can be changed while a volume is in use. All of it, or nothing.
    ///
    /// # Errors
    /// [`DriverError::Parameter`] for a key that is not understood.
    pub fn modify_volume(&self, id: &str, mutable: &Map) -> Result<(), DriverError> {
        check_name("the volume's id", id)?;
        let wanted = parameters::mutable(mutable);
        let volume = self.volume(id)?;
        let wanted = wanted?;
        let _guard = self.locks.take([&volume.id])?;
        let mut volume = self.volume(id)?;
        volume.mutable = volume.mutable.overlaid(wanted);
        self.store.volumes.put(volume.clone())?;
        if !volume.kind.has_image() {
            return Ok(());
        }
        let path = self.pool.image(&volume.id);
        let Some(device) = attach::find(&image::open(&path)?, &path)? else {
            return Ok(());
        };
        if let Some(on) = volume.mutable.direct_io {
            device
                .set_direct_io(on)
                .map_err(DriverError::io("set direct IO of", device.path().display()))?;
        }
        match volume.mutable.read_ahead_kib {
            Some(kib) => attach::set_read_ahead(&device, kib),
            None => Ok(()),
        }
    }
}
