//! As much of ELF as deciding what to copy needs: the interpreter and libraries a program names, and the `.modinfo` of a
//! kernel module. Little-endian 64-bit files only; every offset is checked, so a broken file is a sentence.

use anyhow::{Context, Result, bail, ensure};

const DT_NULL: u64 = 0;
const DT_NEEDED: u64 = 1;

/// A parsed file: its sections.
pub(crate) struct Elf<'a> {
    sections: Vec<Section<'a>>,
}

struct Section<'a> {
    name: &'a str,
    content: &'a [u8],
}

impl<'a> Elf<'a> {
    pub(crate) fn parse(bytes: &'a [u8]) -> Result<Self> {
        ensure!(bytes.starts_with(b"\x7fELF\x02\x01"), "not a 64-bit little-endian ELF file");
        let table = number(bytes, 0x28, 8)?;
        let entry_size = number(bytes, 0x3a, 2)?;
        let count = number(bytes, 0x3c, 2)?;
        let names_index = number(bytes, 0x3e, 2)?;
        ensure!(entry_size >= 64 || count == 0, "section headers of {entry_size} bytes");
        let header = |index: usize| -> Result<(usize, usize, usize)> {
            let at = index.checked_mul(entry_size).and_then(|offset| offset.checked_add(table));
            let header = slice(bytes, at.context("a section header lies past the end of the file")?, 64)?;
            // SHT_NOBITS: takes no room in the file.
            let size = if number(header, 4, 4)? == 8 { 0 } else { number(header, 0x20, 8)? };
            Ok((number(header, 0, 4)?, number(header, 0x18, 8)?, size))
        };
        let mut sections = Vec::new();
        if count > 0 {
            let (_, offset, size) = header(names_index)?;
            let names = slice(bytes, offset, size)?;
            for index in 0..count {
                let (name, offset, size) = header(index)?;
                sections.push(Section { name: string(names, name)?, content: slice(bytes, offset, size)? });
            }
        }
        Ok(Self { sections })
    }

    /// The interpreter of a dynamic program, such as `/lib64/ld-linux-x86-64.so.2`.
    pub(crate) fn interpreter(&self) -> Result<Option<&'a str>> {
        self.section(".interp").map(|content| string(content, 0)).transpose()
    }

    /// The shared libraries the file names (`DT_NEEDED`), in its order.
    pub(crate) fn needed(&self) -> Result<Vec<&'a str>> {
        let Some(dynamic) = self.section(".dynamic") else { return Ok(Vec::new()) };
        let strings = self.section(".dynstr").context("dynamic, but without the section `.dynstr`")?;
        let mut needed = Vec::new();
        for pair in dynamic.chunks_exact(16) {
            let tag = u64::try_from(number(pair, 0, 8)?)?;
            match tag {
                DT_NULL => break,
                DT_NEEDED => needed.push(string(strings, number(pair, 8, 8)?)?),
                _ => {}
            }
        }
        Ok(needed)
    }

    /// The values of one key of a kernel module's `.modinfo`.
    pub(crate) fn module_info(&self, key: &str) -> Result<Vec<&'a str>> {
        let content = self.section(".modinfo").context("not a kernel module: no section `.modinfo`")?;
        let text = std::str::from_utf8(content).context("the section `.modinfo` is not text")?;
        Ok(text
            .split('\0')
            .filter_map(|line| line.split_once('='))
            .filter(|(name, _)| *name == key)
            .map(|(_, value)| value)
            .collect())
    }

    fn section(&self, name: &str) -> Option<&'a [u8]> {
        self.sections.iter().find(|section| section.name == name).map(|section| section.content)
    }
}

fn slice(bytes: &[u8], offset: usize, size: usize) -> Result<&[u8]> {
    let end = offset.checked_add(size).context("a section lies past the end of the file")?;
    bytes.get(offset..end).context("a section lies past the end of the file")
}

fn number(bytes: &[u8], offset: usize, size: usize) -> Result<usize> {
    let mut value = [0; 8];
    let end = offset.checked_add(size).context("the file is cut short")?;
    value[..size].copy_from_slice(bytes.get(offset..end).context("the file is cut short")?);
    Ok(usize::try_from(u64::from_le_bytes(value))?)
}

fn string(table: &[u8], offset: usize) -> Result<&str> {
    let rest = table.get(offset..).context("a name lies past the end of its table")?;
    let Some(end) = rest.iter().position(|byte| *byte == 0) else { bail!("a name without an end") };
    std::str::from_utf8(&rest[..end]).context("a name that is not text")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of nothing but sections, as an assembler would lay it out.
    fn file(sections: &[(&str, &[u8])]) -> Vec<u8> {
        let mut names = vec![0];
        let mut content = Vec::new();
        let mut headers = Vec::new();
        let mut place = |name: &str, bytes: &[u8], names: &mut Vec<u8>| {
            let mut header = [0; 64];
            header[..4].copy_from_slice(&u32::try_from(names.len()).unwrap().to_le_bytes());
            names.extend_from_slice(name.as_bytes());
            names.push(0);
            header[4] = 1;
            header[0x18..0x20].copy_from_slice(&(64 + content.len() as u64).to_le_bytes());
            content.extend_from_slice(bytes);
            header
        };
        for (name, bytes) in sections {
            let mut header = place(name, bytes, &mut names);
            header[0x20..0x28].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
            headers.extend_from_slice(&header);
        }
        let mut header = place(".shstrtab", &[], &mut names);
        header[0x20..0x28].copy_from_slice(&(names.len() as u64).to_le_bytes());
        headers.extend_from_slice(&header);
        content.extend_from_slice(&names);

        let mut bytes = vec![0; 64];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[0x28..0x30].copy_from_slice(&(64 + content.len() as u64).to_le_bytes());
        bytes[0x3a..0x3c].copy_from_slice(&64u16.to_le_bytes());
        let count = u16::try_from(sections.len()).unwrap();
        bytes[0x3c..0x3e].copy_from_slice(&(count + 1).to_le_bytes());
        bytes[0x3e..0x40].copy_from_slice(&count.to_le_bytes());
        bytes.extend_from_slice(&content);
        bytes.extend_from_slice(&headers);
        bytes
    }

    fn dynamic(pairs: &[(u64, u64)]) -> Vec<u8> {
        pairs.iter().flat_map(|(tag, value)| [tag.to_le_bytes(), value.to_le_bytes()].concat()).collect()
    }

    #[test]
    fn a_program_names_its_interpreter_and_libraries() {
        let table = dynamic(&[(DT_NEEDED, 1), (5, 99), (DT_NEEDED, 11), (DT_NULL, 0), (DT_NEEDED, 1)]);
        let bytes = file(&[
            (".interp", b"/lib64/ld.so\0"),
            (".dynstr", b"\0libc.so.6\0libnft.so\0"),
            (".dynamic", &table),
        ]);
        let elf = Elf::parse(&bytes).unwrap();
        assert_eq!(elf.interpreter().unwrap(), Some("/lib64/ld.so"));
        assert_eq!(elf.needed().unwrap(), ["libc.so.6", "libnft.so"]);
    }

    #[test]
    fn a_static_program_needs_nothing() {
        let bytes = file(&[(".text", b"code")]);
        let elf = Elf::parse(&bytes).unwrap();
        assert_eq!(elf.interpreter().unwrap(), None);
        assert!(elf.needed().unwrap().is_empty());
    }

    #[test]
    fn a_module_lists_what_it_depends_on() {
        let bytes = file(&[(".modinfo", b"license=GPL\0depends=bridge,stp\0softdep=pre: crc32c\0")]);
        let elf = Elf::parse(&bytes).unwrap();
        assert_eq!(elf.module_info("depends").unwrap(), ["bridge,stp"]);
        assert!(elf.module_info("alias").unwrap().is_empty());
    }

    #[test]
    fn a_broken_file_is_an_error_at_every_length_and_every_changed_byte() {
        let table = dynamic(&[(DT_NEEDED, 1), (DT_NULL, 0)]);
        let bytes = file(&[(".dynstr", b"\0libc.so.6\0"), (".dynamic", &table), (".modinfo", b"depends=\0")]);
        let look = |bytes: &[u8]| {
            if let Ok(elf) = Elf::parse(bytes) {
                drop((elf.interpreter(), elf.needed(), elf.module_info("depends")));
            }
        };
        for length in 0..bytes.len() {
            assert!(Elf::parse(&bytes[..length]).is_err(), "cut at {length}");
        }
        for index in 0..bytes.len() {
            let mut broken = bytes.clone();
            broken[index] = 0xff;
            look(&broken);
        }
    }
}
