//! STATUS: whether an ADD would find what it needs.

use cni::skel::Input;
use cni::types::{CniError, ErrorCode};

use crate::conf::{RoutedConf, not_ready};
use crate::{Routed, lease, state};

pub(crate) fn status(plugin: &Routed, input: &Input<'_>) -> Result<(), CniError> {
    let conf = RoutedConf::parse(plugin, input)?;
    let state = state::read(&conf.state_dir).map_err(|e| not_ready(ErrorCode::NotAvailable, &e))?;
    lease::status(input, &conf, &state)
}
