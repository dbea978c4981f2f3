//! A packet on its travels between threads.
#![allow(unsafe_code)]

use std::fmt;
use std::net::SocketAddr;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use super::arena::Shared;
use super::packet::Parts;
use super::shape::Shape;
use crate::offload::{Meta, VnetFault};
use crate::sys::ancillary::LocalAddr;

/// A packet that any thread may hold, read and change, made by [`PacketBuf::into_remote`](crate::PacketBuf::into_remote).
///
/// Dropping it, on any thread, returns its memory through the home worker's return queue: a few atomic operations, no lock, no system
/// call unless the home worker sleeps for want of buffers. [`Worker::import`](crate::Worker::import) makes a `PacketBuf` of it again.
/// The memory lives until the last handle is gone, also after its worker ended.
pub struct RemoteBuf {
    shared: Arc<Shared>,
    parts: Parts,
}

impl RemoteBuf {
    /// Takes over one view.
    pub(crate) fn from_parts(shared: Arc<Shared>, parts: Parts) -> Self {
        Self { shared, parts }
    }

    /// Replaces its content, at the usual place, with that of a packet of which `shape` was said when it began at `start` in its slot. It must have a slot of its own that is long enough.
    pub(crate) fn refill(&mut self, bytes: &[u8], shape: Shape, start: u32) {
        self.parts.start = self.shared.data_offset();
        self.parts.len = bytes.len() as u32;
        assert!(
            self.parts.start + self.parts.len <= self.parts.high,
            "longer than its slot"
        );
        self.copy_from_slice(bytes);
        // Last: writing ends a verdict, and this one is on the bytes just written.
        self.parts.shape = shape.moved(start, self.parts.start);
    }

    /// Whether `shared` is the arena that it came from.
    pub(crate) fn is_home(&self, shared: &Arc<Shared>) -> bool {
        Arc::ptr_eq(&self.shared, shared)
    }

    /// Hands the view over to the caller.
    pub(crate) fn into_parts(self) -> Parts {
        let this = std::mem::ManuallyDrop::new(self);
        // SAFETY: `this` is never used again, so its reference is dropped once, here; the view passes to the caller.
        drop(unsafe { std::ptr::read(&this.shared) });
        this.parts
    }

    /// What is said of it, and where it begins in its slot.
    pub(crate) fn shape(&self) -> (Shape, u32) {
        (self.parts.shape, self.parts.start)
    }

    /// What is still to be done with it; see [`PacketBuf::meta`](crate::PacketBuf::meta).
    ///
    /// # Errors
    /// As there.
    pub fn meta(&self) -> Result<Meta, VnetFault> {
        self.parts.shape.meta(self, self.parts.start)
    }

    /// The peer address that it carries; see [`PacketBuf::peer`](crate::PacketBuf::peer).
    pub fn peer(&self) -> Option<SocketAddr> {
        self.parts.peer
    }

    /// Sets the peer address that it carries.
    ///
    /// Another peer than before forgets the local address; see
    /// [`PacketBuf::set_peer`](crate::PacketBuf::set_peer).
    pub fn set_peer(&mut self, peer: Option<SocketAddr>) {
        if self.parts.peer != peer {
            self.parts.peer = peer;
            self.parts.local = None;
        }
    }

    /// The address of this host that it was sent to; see
    /// [`PacketBuf::local`](crate::PacketBuf::local).
    pub fn local(&self) -> Option<LocalAddr> {
        self.parts.local
    }

    /// Sets the address of this host that it shall be sent from; see
    /// [`PacketBuf::set_local`](crate::PacketBuf::set_local).
    pub fn set_local(&mut self, local: Option<LocalAddr>) {
        self.parts.local = local;
    }
}

impl Deref for RemoteBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let at = self.shared.address(self.parts.slot, self.parts.start);
        // SAFETY: the range belongs to this view alone, the slot stays checked out until the view is given back in `drop`, and the
        // mapping lives as long as `shared`.
        unsafe { std::slice::from_raw_parts(at.as_ptr(), self.parts.len as usize) }
    }
}

impl DerefMut for RemoteBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // What was verified may be changed.
        self.parts.shape.unverify();
        let at = self.shared.address(self.parts.slot, self.parts.start);
        // SAFETY: as in `deref`; `&mut self` makes it the only access.
        unsafe { std::slice::from_raw_parts_mut(at.as_ptr(), self.parts.len as usize) }
    }
}

impl Drop for RemoteBuf {
    fn drop(&mut self) {
        self.shared.give_back(self.parts.slot);
    }
}

impl fmt::Debug for RemoteBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemoteBuf")
            .field("len", &self.len())
            .field("peer", &self.parts.peer)
            .field("local", &self.parts.local)
            .finish_non_exhaustive()
    }
}
