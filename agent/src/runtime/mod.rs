//! The two traits that pods stand on, over the microVM manager and the image store.

mod images;
mod sandboxes;
mod store;

pub use images::StoreImages;
pub use sandboxes::MicroVms;
