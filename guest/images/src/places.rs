//! Where layers are known to lie: which blob, in which repository, holds an unpacked layer.
//!
//! A push asks for these before it sends anything. They are hints: wrong or lost, they cost a request. So they are written
//! without waiting for the disk.

use redb::{Durability, ReadableTable};
use serde::{Deserialize, Serialize};

use crate::{
    Digest, Result,
    database::{self, PLACES},
    images::Inner,
    manifest::Descriptor,
};

/// Places of one layer at most.
const PLACES_MAX: usize = 16;

/// A blob in a repository.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Place {
    pub(crate) blob: Digest,
    pub(crate) size: u64,
    pub(crate) media_type: String,
    /// With the registry in front.
    pub(crate) repository: String,
}

impl Place {
    pub(crate) fn descriptor(&self) -> Descriptor {
        Descriptor::new(&self.media_type, self.blob, self.size)
    }
}

impl Inner {
    /// The places of a layer, newest first. Blocks.
    pub(crate) fn places(&self, diff_id: &Digest) -> Result<Vec<Place>> {
        Ok(self.store.get(PLACES, &diff_id.hex())?.unwrap_or_default())
    }

    /// Remembers that layers lie in a repository. Blocks.
    pub(crate) fn note_places<'a>(
        &self,
        repository: &str,
        layers: impl IntoIterator<Item = (&'a Digest, Descriptor)>,
    ) -> Result<()> {
        let mut transaction = self.store.write()?;
        transaction.set_durability(Durability::None)?;
        {
            let mut table = transaction.open_table(PLACES)?;
            for (diff_id, blob) in layers {
                let key = diff_id.hex();
                let mut places: Vec<Place> = database::get(&table, &key)?.unwrap_or_default();
                places.retain(|place| place.blob != blob.digest || place.repository != repository);
                places.insert(
                    0,
                    Place {
                        blob: blob.digest,
                        size: blob.size,
                        media_type: blob.media_type,
                        repository: repository.to_owned(),
                    },
                );
                places.truncate(PLACES_MAX);
                table.insert(key.as_str(), database::encode(&places)?.as_slice())?;
            }
        }
        Ok(transaction.commit()?)
    }

    /// Forgets that a blob lies in a repository. Blocks.
    pub(crate) fn forget_place(&self, diff_id: &Digest, blob: &Digest, repository: &str) -> Result<()> {
        let mut transaction = self.store.write()?;
        transaction.set_durability(Durability::None)?;
        {
            let mut table = transaction.open_table(PLACES)?;
            let key = diff_id.hex();
            let mut places: Vec<Place> = database::get(&table, &key)?.unwrap_or_default();
            places.retain(|place| place.blob != *blob || place.repository != repository);
            if places.is_empty() {
                table.remove(key.as_str())?;
            } else {
                table.insert(key.as_str(), database::encode(&places)?.as_slice())?;
            }
        }
        Ok(transaction.commit()?)
    }
}

/// Layers with places, for the collector.
pub(crate) fn known(table: &impl ReadableTable<&'static str, &'static [u8]>) -> Result<Vec<String>> {
    table.iter()?.map(|row| Ok(row?.0.value().to_owned())).collect()
}
