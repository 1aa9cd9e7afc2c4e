//! The primitive fields of Kafka's generated messages, in their plain and their flexible encoding.
//!
//! Owns: fixed integers, strings, byte strings, arrays and tagged fields
//! (<https://kafka.apache.org/protocol#protocol_types>). Refuses: to read past its input, and to believe a count that the bytes
//! left cannot hold. Read next: `super`, which lays the messages out.

use super::SchemaError;
use headwater_proto::TopicId;

/// Takes fields off the front of a message.
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    flexible: bool,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8], flexible: bool) -> Reader<'a> {
        Reader { bytes, flexible }
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], SchemaError> {
        let (head, tail) = self.bytes.split_at_checked(count).ok_or(SchemaError::Truncated)?;
        self.bytes = tail;
        Ok(head)
    }

    fn fixed<const N: usize>(&mut self) -> Result<[u8; N], SchemaError> {
        let (head, tail) = self.bytes.split_first_chunk::<N>().ok_or(SchemaError::Truncated)?;
        self.bytes = tail;
        Ok(*head)
    }

    pub(super) fn i8(&mut self) -> Result<i8, SchemaError> {
        self.fixed().map(i8::from_be_bytes)
    }

    pub(super) fn i16(&mut self) -> Result<i16, SchemaError> {
        self.fixed().map(i16::from_be_bytes)
    }

    pub(super) fn i32(&mut self) -> Result<i32, SchemaError> {
        self.fixed().map(i32::from_be_bytes)
    }

    pub(super) fn i64(&mut self) -> Result<i64, SchemaError> {
        self.fixed().map(i64::from_be_bytes)
    }

    pub(super) fn topic_id(&mut self) -> Result<TopicId, SchemaError> {
        self.fixed().map(TopicId::from_bytes)
    }

    fn unsigned_varint(&mut self) -> Result<u32, SchemaError> {
        let mut value = 0u32;
        for shift in [0u32, 7, 14, 21, 28] {
            let [byte] = self.fixed()?;
            let part = u32::from(byte & 0x7f);
            if shift == 28 && part > 0x0f {
                return Err(SchemaError::Malformed("a variable-length number exceeds 32 bits"));
            }
            value |= part << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(SchemaError::Malformed("a variable-length number exceeds 32 bits"))
    }

    /// A length as written for this encoding; `None` is null.
    fn length(&mut self, plain: fn(&mut Self) -> Result<i32, SchemaError>) -> Result<Option<usize>, SchemaError> {
        if self.flexible {
            return Ok(self.unsigned_varint()?.checked_sub(1).map(|length| length as usize));
        }
        match plain(self)? {
            -1 => Ok(None),
            length => usize::try_from(length).map(Some).map_err(|_| SchemaError::Malformed("a length is negative")),
        }
    }

    pub(super) fn nullable_string(&mut self) -> Result<Option<String>, SchemaError> {
        let Some(length) = self.length(|reader| reader.i16().map(i32::from))? else {
            return Ok(None);
        };
        let text =
            std::str::from_utf8(self.take(length)?).map_err(|_| SchemaError::Malformed("a string is not UTF-8"))?;
        Ok(Some(text.to_owned()))
    }

    pub(super) fn string(&mut self) -> Result<String, SchemaError> {
        self.nullable_string()?.ok_or(SchemaError::Malformed("a string that cannot be null is null"))
    }

    pub(super) fn byte_string(&mut self) -> Result<Vec<u8>, SchemaError> {
        let length = self.length(Self::i32)?.ok_or(SchemaError::Malformed("bytes that cannot be null are null"))?;
        self.take(length).map(<[u8]>::to_vec)
    }

    /// An array of `item`s, each at least one byte long.
    pub(super) fn array<T>(
        &mut self,
        mut item: impl FnMut(&mut Self) -> Result<T, SchemaError>,
    ) -> Result<Vec<T>, SchemaError> {
        let count = self.length(Self::i32)?.ok_or(SchemaError::Malformed("an array that cannot be null is null"))?;
        if count > self.bytes.len() {
            return Err(SchemaError::Truncated);
        }
        (0..count).map(|_| item(self)).collect()
    }

    /// The tagged fields that end every structure of a flexible version; `field` is given those there are, and may leave one unread.
    pub(super) fn tagged(
        &mut self,
        mut field: impl FnMut(u32, &mut Reader<'a>) -> Result<(), SchemaError>,
    ) -> Result<(), SchemaError> {
        if !self.flexible {
            return Ok(());
        }
        for _ in 0..self.unsigned_varint()? {
            let tag = self.unsigned_varint()?;
            let size = self.unsigned_varint()? as usize;
            field(tag, &mut Reader::new(self.take(size)?, true))?;
        }
        Ok(())
    }

    pub(super) fn untagged(&mut self) -> Result<(), SchemaError> {
        self.tagged(|_, _| Ok(()))
    }
}

/// Puts fields at the end of a message.
pub(super) struct Writer {
    pub(super) bytes: Vec<u8>,
    flexible: bool,
}

impl Writer {
    /// A message that begins with its version (or, for a key, its kind).
    pub(super) fn new(version: i16, flexible: bool) -> Writer {
        Writer { bytes: version.to_be_bytes().to_vec(), flexible }
    }

    pub(super) fn i8(&mut self, value: i8) {
        self.bytes.extend(value.to_be_bytes());
    }

    pub(super) fn i32(&mut self, value: i32) {
        self.bytes.extend(value.to_be_bytes());
    }

    pub(super) fn i64(&mut self, value: i64) {
        self.bytes.extend(value.to_be_bytes());
    }

    pub(super) fn topic_id(&mut self, id: &TopicId) {
        self.bytes.extend(id.as_bytes());
    }

    fn unsigned_varint(&mut self, mut value: u32) {
        while value >= 0x80 {
            self.bytes.push((value & 0x7f) as u8 | 0x80);
            value >>= 7;
        }
        self.bytes.push(value as u8);
    }

    /// A length below 2^31 - 1, which bounds everything that fits a record.
    fn flexible_length(&mut self, length: usize) -> Result<(), SchemaError> {
        let length = i32::try_from(length).map_err(|_| SchemaError::TooLong(length))?;
        self.unsigned_varint(length as u32 + 1);
        Ok(())
    }

    fn length(&mut self, length: usize) -> Result<(), SchemaError> {
        if self.flexible {
            return self.flexible_length(length);
        }
        self.i32(i32::try_from(length).map_err(|_| SchemaError::TooLong(length))?);
        Ok(())
    }

    pub(super) fn string(&mut self, text: &str) -> Result<(), SchemaError> {
        if self.flexible {
            self.flexible_length(text.len())?;
        } else {
            let length = i16::try_from(text.len()).map_err(|_| SchemaError::TooLong(text.len()))?;
            self.bytes.extend(length.to_be_bytes());
        }
        self.bytes.extend(text.as_bytes());
        Ok(())
    }

    pub(super) fn nullable_string(&mut self, text: Option<&str>) -> Result<(), SchemaError> {
        match text {
            Some(text) => self.string(text)?,
            None if self.flexible => self.bytes.push(0),
            None => self.bytes.extend((-1i16).to_be_bytes()),
        }
        Ok(())
    }

    pub(super) fn byte_string(&mut self, bytes: &[u8]) -> Result<(), SchemaError> {
        self.length(bytes.len())?;
        self.bytes.extend(bytes);
        Ok(())
    }

    pub(super) fn array<T>(
        &mut self,
        items: &[T],
        mut item: impl FnMut(&mut Self, &T) -> Result<(), SchemaError>,
    ) -> Result<(), SchemaError> {
        self.length(items.len())?;
        items.iter().try_for_each(|value| item(self, value))
    }

    /// Ends a structure with no tagged field.
    pub(super) fn untagged(&mut self) {
        if self.flexible {
            self.bytes.push(0);
        }
    }

    /// Ends a structure with one tagged field of number 0.
    pub(super) fn tagged(
        &mut self,
        field: impl FnOnce(&mut Writer) -> Result<(), SchemaError>,
    ) -> Result<(), SchemaError> {
        let mut inner = Writer::field();
        field(&mut inner)?;
        self.tagged_fields(vec![(0, inner)])
    }

    /// The value of a tagged field.
    pub(super) fn field() -> Writer {
        Writer { bytes: Vec::new(), flexible: true }
    }

    /// Ends a structure with tagged fields, which come in the order of their numbers.
    pub(super) fn tagged_fields(&mut self, fields: Vec<(u32, Writer)>) -> Result<(), SchemaError> {
        let length = |bytes: usize| u32::try_from(bytes).map_err(|_| SchemaError::TooLong(bytes));
        self.unsigned_varint(length(fields.len())?);
        for (tag, Writer { bytes, .. }) in fields {
            self.unsigned_varint(tag);
            self.unsigned_varint(length(bytes.len())?);
            self.bytes.extend(bytes);
        }
        Ok(())
    }
}
