//! What a power failure leaves of the files of a broker that is dead.

use super::log::{self, Change, Record, kept_at, kept_of};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// What a disk keeps whole, and what it at least writes at once, in bytes.
const PAGE: u64 = 4096;
const SECTOR: u64 = 512;

/// How much of what was not synced is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Loss {
    /// All of it.
    Everything,
    /// What this seed chooses: of a directory's changes the last ones, of a file any length and any page or sector.
    Some(u64),
}

/// What was lost.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PowerFailure {
    /// Changes of names that were undone.
    pub(crate) names: usize,
    /// Files whose contents were not all synced.
    pub(crate) files: usize,
    /// Pages of theirs that are not as they were last written.
    pub(crate) pages: usize,
}

impl PowerFailure {
    /// The power of the machine with this data folder fails; no process may use it. From here on all that is there is on the disk.
    pub(crate) fn strike(root: &Path, loss: Loss) -> io::Result<PowerFailure> {
        let (records, _) = log::read(root)?;
        let mut rng = StdRng::seed_from_u64(match loss {
            Loss::Everything => 0,
            Loss::Some(seed) => seed,
        });
        let mut struck = PowerFailure::default();
        undo_names(root, &records, (loss, &mut rng), &mut struck)?;
        let mut paths = HashMap::new();
        find_files(root, &mut paths)?;
        for (ino, changes) in unsynced_contents(&records) {
            let Some(path) = paths.get(&ino) else { continue };
            struck.files += 1;
            struck.pages += undo_contents(path, &changes, (loss, &mut rng))?;
        }
        log::forget(root)?;
        Ok(struck)
    }
}

/// Undoes, from the last to the first, changes of names that no sync of their directory came after; of each directory's those up to one
/// are kept, for they reach the disk in their order.
fn undo_names(
    root: &Path,
    records: &[Record],
    (loss, rng): (Loss, &mut StdRng),
    struck: &mut PowerFailure,
) -> io::Result<()> {
    let mut synced: HashMap<u64, u64> = HashMap::new();
    for (change, _) in records {
        if let Change::NamesSynced { dir, before } = change {
            let known = synced.entry(*dir).or_default();
            *known = (*known).max(*before);
        }
    }
    let mut unsynced: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    for (number, (change, _)) in (0..).zip(records) {
        if let Change::Made { dir, .. } | Change::Remove { dir, .. } | Change::Rename { dir, .. } = change
            && number >= synced.get(dir).copied().unwrap_or(0)
        {
            unsynced.entry(*dir).or_default().push(number);
        }
    }
    let mut lost: BTreeSet<u64> = BTreeSet::new();
    for numbers in unsynced.values() {
        let keep = match loss {
            Loss::Everything => 0,
            Loss::Some(_) => rng.random_range(0..=numbers.len()),
        };
        lost.extend(&numbers[keep..]);
    }
    struck.names = lost.len();
    let kept = kept_of(root);
    for number in lost.into_iter().rev() {
        let change = &records[usize::try_from(number).expect("it is in memory")].0;
        undo_name(root, change, &kept_at(&kept, number))?;
    }
    Ok(())
}

fn undo_name(root: &Path, change: &Change, kept: &Path) -> io::Result<()> {
    let in_dir = |dir: u64, name: &str| Ok::<_, io::Error>(find_dir(root, dir)?.map(|dir| dir.join(name)));
    match change {
        Change::Made { dir, name, ino } => {
            // A directory that is gone itself took its names along.
            let Some(path) = in_dir(*dir, name)? else { return Ok(()) };
            assert_eq!(ino_of(&path), Some(*ino), "{} was made, and is another", path.display());
            if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
        }
        Change::Remove { dir, name, .. } => match in_dir(*dir, name)? {
            Some(path) if kept.exists() => fs::rename(kept, path),
            _ => Ok(()),
        },
        Change::Rename { dir, from, to, ino } => {
            let (Some(from), Some(to)) = (in_dir(*dir, from)?, in_dir(*dir, to)?) else { return Ok(()) };
            // Else the process was killed before it came to that.
            if ino_of(&to) == Some(*ino) {
                fs::rename(&to, from)?;
                if kept.exists() {
                    fs::rename(kept, to)?;
                }
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

fn ino_of(path: &Path) -> Option<u64> {
    fs::symlink_metadata(path).ok().map(|metadata| metadata.ino())
}

/// The directory with this inode, at or below a folder, or among what was removed.
fn find_dir(folder: &Path, ino: u64) -> io::Result<Option<PathBuf>> {
    if ino_of(folder) == Some(ino) {
        return Ok(Some(folder.to_owned()));
    }
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir()
            && let Some(found) = find_dir(&entry.path(), ino)?
        {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

fn find_files(folder: &Path, paths: &mut HashMap<u64, PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => find_files(&entry.path(), paths)?,
            false => drop(paths.insert(entry.metadata()?.ino(), entry.path())),
        }
    }
    Ok(())
}

/// The changes of each file that no sync of it came after.
fn unsynced_contents(records: &[Record]) -> BTreeMap<u64, Vec<&Record>> {
    let mut changes: BTreeMap<u64, Vec<(u64, &Record)>> = BTreeMap::new();
    for (number, record) in (0..).zip(records) {
        match &record.0 {
            Change::Write { ino, .. } | Change::Length { ino, .. } => {
                changes.entry(*ino).or_default().push((number, record));
            }
            // A file whose inode somebody had before.
            Change::Made { ino, .. } => drop(changes.remove(ino)),
            Change::Synced { ino, before } => {
                if let Some(changes) = changes.get_mut(ino) {
                    changes.retain(|(number, _)| number >= before);
                }
            }
            _ => {}
        }
    }
    let changes = changes.into_iter().filter(|(_, changes)| !changes.is_empty());
    changes.map(|(ino, changes)| (ino, changes.into_iter().map(|(_, record)| record).collect())).collect()
}

/// Takes a file back to what was synced, and from there to what the seed keeps. How many pages are not as they were.
fn undo_contents(path: &Path, changes: &[&Record], (loss, rng): (Loss, &mut StdRng)) -> io::Result<usize> {
    let file = fs::File::options().read(true).write(true).open(path)?;
    let written_len = file.metadata()?.len();
    let mut pages: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
    for (change, _) in changes {
        if let Change::Write { at, len, .. } = change {
            for page in at / PAGE..(at + len).div_ceil(PAGE) {
                if let std::collections::btree_map::Entry::Vacant(vacant) = pages.entry(page) {
                    vacant.insert(read_page(&file, page)?);
                }
            }
        }
    }
    for (change, old) in changes.iter().rev() {
        let (at, zeros) = match change {
            Change::Write { at, len, old_len, zeros, .. } => {
                file.set_len(*old_len)?;
                (*at, zeros.then(|| (at + len).min(*old_len).saturating_sub(*at)))
            }
            Change::Length { old_len, new_len, zeros, .. } => {
                file.set_len(*old_len)?;
                (*new_len, zeros.then(|| old_len.saturating_sub(*new_len)))
            }
            _ => continue,
        };
        match zeros {
            Some(len) => write_zeros(&file, at, len)?,
            None => file.write_all_at(old, at)?,
        }
    }
    let synced_len = file.metadata()?.len();
    if let Loss::Some(_) = loss {
        let end = if rng.random() { synced_len } else { written_len };
        file.set_len(end)?;
        for (page, written) in &pages {
            let (start, torn) = (page * PAGE, rng.random_range(0..3));
            for (sector, bytes) in (0..).zip(written.chunks(SECTOR as usize)) {
                let at = start + sector * SECTOR;
                let is_kept = torn == 0 || (torn == 1 && rng.random());
                if is_kept && at < end {
                    file.write_all_at(&bytes[..bytes.len().min((end - at) as usize)], at)?;
                }
            }
        }
    }
    let mut other = 0;
    for (page, written) in &pages {
        other += usize::from(read_page(&file, *page)? != *written);
    }
    Ok(other)
}

fn read_page(file: &fs::File, page: u64) -> io::Result<Vec<u8>> {
    let (mut bytes, mut done) = (vec![0; PAGE as usize], 0);
    loop {
        match file.read_at(&mut bytes[done..], page * PAGE + done as u64)? {
            0 => break,
            n => done += n,
        }
    }
    bytes.truncate(done);
    Ok(bytes)
}

fn write_zeros(file: &fs::File, mut at: u64, len: u64) -> io::Result<()> {
    let (zeros, end) = (vec![0; 64 * 1024], at + len);
    while at < end {
        let n = (end - at).min(zeros.len() as u64);
        file.write_all_at(&zeros[..n as usize], at)?;
        at += n;
    }
    Ok(())
}
