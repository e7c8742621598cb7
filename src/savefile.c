/*-------------------------------------------------------------------------
 *
 * savefile.c
 *	  The file of counts that were not stored at a shutdown: its format.
 *
 * The file has a header with the length and the checksum of everything, then
 * sections, one for each buffer and shape of its keys, each with its keys, in
 * blocks, and then a list of the sections.  It is written under a temporary
 * name, synced, and renamed when it is complete.
 *
 * Keys are in the order of hashes, so that loading them touches one part of the
 * table after the other, and so that a process that looks for a key while the
 * file is being loaded can tell whether it has been.  What the positions mean is
 * known to table.c; here they are numbers whose upper half is that of the
 * partition.
 *
 * The file belongs to one timeline of one database cluster.  A standby, or a
 * restored backup, that has got a copy of the file may have received by
 * replication what the primary has stored of it in the meantime.
 *
 * load.c decides when a file is read and what becomes of it; save.c decides
 * what is written.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "access/xlog.h"
#include "miscadmin.h"
#include "packed.h"
#include "savefile.h"
#include "storage/fd.h"

#define SAVED_MAGIC			0x53425346

/*
 * Increase this with every change of the format, and also of what it rests on:
 * key_hash() and hash_position().
 */
#define SAVED_VERSION		4

/* a block is closed at the end of a portion when it has this size, */
#define BLOCK_SIZE			(128 * 1024)

/* and what is closed is written when it has this size */
#define WRITE_SIZE			(256 * 1024)

/* how far the kernel may lag behind with writing to disk */
#define FLUSH_SIZE			(16 * 1024 * 1024)

/* how much to read at a time when the file is checked */
#define CHECK_SIZE			(256 * 1024)

/* the most bytes that a key takes in a block: two numbers, a length, the key */
#define VARINT_MAX			10
#define PACKED_MAX(len)		(2 * VARINT_MAX + sizeof(uint16) + (len))

/* Does the file exist?  If that cannot be determined, returns true. */
bool
savefile_exists(const char *name)
{
	return access(name, F_OK) == 0 || errno != ENOENT;
}

/* Remove a file if it exists.  A failure is a warning. */
void
savefile_remove(const char *name)
{
	if (savefile_exists(name))
		(void) durable_unlink(name, WARNING);
}

/* Check an open file.  See savefile_check(). */
static const char *
check_open_file(FILE *file, SavedHeader *header)
{
	struct stat st;
	pg_crc32c	crc;
	char	   *data;

	if (fstat(fileno(file), &st) != 0 ||
		(fread(header, 1, sizeof(SavedHeader), file) != sizeof(SavedHeader) &&
		 ferror(file)))
		return psprintf(_("It could not be read: %s."), strerror(errno));
	if (st.st_size < sizeof(SavedHeader))
		return _("It is too short.");
	if (header->magic != SAVED_MAGIC)
		return _("It does not contain saved counts.");
	if (header->version != SAVED_VERSION)
		return psprintf(_("Its version is %u, but this statbuffer reads version %u."),
						header->version, SAVED_VERSION);
	if ((uint64) st.st_size != sizeof(SavedHeader) + header->length)
		return psprintf(_("It has %llu bytes instead of %llu."),
						(unsigned long long) st.st_size,
						(unsigned long long) (sizeof(SavedHeader) +
											  header->length));

	INIT_CRC32C(crc);
	data = palloc(CHECK_SIZE);
	for (uint64 left = header->length; left > 0;)
	{
		size_t		size = Min(left, CHECK_SIZE);

		if (fread(data, 1, size, file) != size)
			return psprintf(_("It could not be read: %s."), strerror(errno));
		COMP_CRC32C(crc, data, size);
		left -= size;
		CHECK_FOR_INTERRUPTS();
	}
	pfree(data);
	COMP_CRC32C(crc, header, offsetof(SavedHeader, crc));
	FIN_CRC32C(crc);
	if (!EQ_CRC32C(crc, header->crc))
		return _("Its checksum is wrong.");

	if (header->system_identifier != GetSystemIdentifier())
		return _("It belongs to another database cluster.");
	if (header->timeline != GetWALInsertionTimeLine())
		return psprintf(_("It belongs to timeline %u, but the server is on timeline %u."),
						header->timeline, GetWALInsertionTimeLine());
	return NULL;
}

/*
 * Check the header and the contents of a file.  Returns what is wrong with it,
 * or NULL.
 */
const char *
savefile_check(const char *name, SavedHeader *header)
{
	FILE	   *file = AllocateFile(name, PG_BINARY_R);
	const char *reason;

	if (file == NULL)
		return psprintf(_("It could not be read: %s."), strerror(errno));

	/* what is read is much at a time, and not read again from here */
	setvbuf(file, NULL, _IONBF, 0);
	reason = check_open_file(file, header);
	FreeFile(file);
	return reason;
}

/*
 * Rename a file that cannot be used, so that it is not read again.  A failure
 * is a warning.
 */
void
savefile_set_aside(const char *name, const char *reason)
{
	char		aside[MAXPGPATH];
	long		number = (long) time(NULL);

	do
		snprintf(aside, sizeof(aside), "%s.%ld", name, number++);
	while (savefile_exists(aside));

	/* not durable_rename(), which must be able to open it */
	if (rename(name, aside) != 0)
	{
		ereport(WARNING,
				(errcode_for_file_access(),
				 errmsg("could not rename file \"%s\" to \"%s\": %m",
						name, aside),
				 errdetail("%s", reason),
				 errhint("Counts of the next shutdown will overwrite the file.")));
		return;
	}
	ereport(WARNING,
			(errcode(ERRCODE_DATA_CORRUPTED),
			 errmsg("cannot use file \"%s\" with counts of the last shutdown",
					name),
			 errdetail("%s", reason),
			 errhint("The file has been renamed to \"%s\"; the counts in it are not stored.",
					 aside)));
}

/* ------------------------------------------------------------------------
 * Packed keys
 *
 * A key is its length (two bytes), its count and its time as packed numbers, and
 * its stored form.
 * ------------------------------------------------------------------------
 */

/*
 * Times are stored as how long before saved_at they are, plus 1: 0 is for those
 * that are 0.
 */
static inline uint64
pack_time(const SavedHeader *header, TimestampTz time)
{
	return time == 0 ? 0 : fold_sign(header->saved_at - time) + 1;
}

static inline TimestampTz
unpack_time(const SavedHeader *header, uint64 packed)
{
	return packed == 0 ? 0 : header->saved_at - unfold_sign(packed - 1);
}

/* ------------------------------------------------------------------------
 * Reading
 * ------------------------------------------------------------------------
 */

static void
report_unexpected(const char *what)
{
	elog(ERROR, "unexpected %s in file \"%s\"", what, SAVED_LOADING_FILE);
}

static void
read_exactly(int fd, int64 offset, void *data, size_t size)
{
	ssize_t		done = pg_pread(fd, data, size, (off_t) offset);

	if (done == size)
		return;
	if (done < 0)
		ereport(ERROR,
				(errcode_for_file_access(),
				 errmsg("could not read file \"%s\": %m",
						SAVED_LOADING_FILE)));
	ereport(ERROR,
			(errcode(ERRCODE_DATA_CORRUPTED),
			 errmsg("could not read file \"%s\": read %zd of %zu",
					SAVED_LOADING_FILE, done, size)));
}

/*
 * Open a file for reading, which savefile_check() has checked.  This and the
 * other functions for reading raise an error if that fails, or if the file is
 * not as expected.
 */
SavedReader *
savefile_open(const char *name)
{
	SavedReader *reader = palloc0(sizeof(SavedReader));

	reader->fd = OpenTransientFile(name, O_RDONLY | PG_BINARY);
	if (reader->fd < 0)
		ereport(ERROR,
				(errcode_for_file_access(),
				 errmsg("could not open file \"%s\": %m", name)));
	read_exactly(reader->fd, 0, &reader->header, sizeof(SavedHeader));
	reader->end = sizeof(SavedHeader) + reader->header.length -
		reader->header.nsections * sizeof(SavedRange);
	return reader;
}

void
savefile_close(SavedReader *reader)
{
	CloseTransientFile(reader->fd);
	if (reader->data != NULL)
		pfree(reader->data);
	pfree(reader);
}

/*
 * Read the record at an offset, without the shape or the keys that follow it.
 * Returns false at the end.
 */
bool
savefile_read_record(SavedReader *reader, int64 offset, SavedRecord *record)
{
	if (offset >= reader->end)
		return false;
	read_exactly(reader->fd, offset, record, sizeof(SavedRecord));
	if (record->kind != RECORD_SECTION && record->kind != RECORD_BLOCK)
		report_unexpected("record");
	return true;
}

/*
 * Read the shape that follows the section at an offset.  The result is in the
 * current memory context.
 */
KeyShape *
savefile_read_shape(SavedReader *reader, int64 offset,
					const SavedSection *section)
{
	KeyShape   *shape;

	if (section->shape_size > SHAPE_MAX_SIZE ||
		section->shape_size < offsetof(KeyShape, data))
		report_unexpected("shape");
	shape = palloc(section->shape_size);
	read_exactly(reader->fd, offset + sizeof(SavedSection), shape,
				 section->shape_size);
	if (!shape_is_valid(shape, section->shape_size))
		report_unexpected("shape");
	return shape;
}

/* Read the keys that follow the block at an offset. */
void
savefile_read_block(SavedReader *reader, int64 offset, const SavedBlock *block)
{
	if (block->size > reader->end - offset)
		report_unexpected("block");
	if (block->size > reader->allocated)
	{
		if (reader->data != NULL)
			pfree(reader->data);
		reader->data = NULL;
		reader->data = palloc(block->size);
		reader->allocated = block->size;
	}
	read_exactly(reader->fd, offset + sizeof(SavedBlock), reader->data,
				 block->size);
	reader->next = reader->data;
	reader->data_end = reader->data + block->size;
}

/*
 * Take the next key of a block that was read.  The caller has counted them.
 * Its data stays until the next block is read.
 */
void
savefile_next_key(SavedReader *reader, SavedKey *key)
{
	const char *end = reader->data_end;
	const char *from = reader->next;
	uint64		count = 0;
	uint64		time = 0;

	if (end - from < sizeof(key->len))
		report_unexpected("key");
	memcpy(&key->len, from, sizeof(key->len));
	from = unpack_number(from + sizeof(key->len), end, &count);
	if (from != NULL)
		from = unpack_number(from, end, &time);
	if (from == NULL || KEY_LENGTH(key->len) > sizeof(((KeySpace *) 0)->data) ||
		KEY_LENGTH(key->len) > end - from)
		report_unexpected("key");
	key->count = unfold_sign(count);
	key->counted_at = unpack_time(&reader->header, time);
	key->data = from;
	reader->next = from + KEY_LENGTH(key->len);
}

/*
 * Read where the sections of a file are, into the current memory context.
 * Returns NULL if the file cannot be read, as it may have been removed, or
 * replaced, at this moment.
 */
SavedRange *
savefile_read_ranges(const char *name, int *nranges)
{
	int			fd = OpenTransientFile(name, O_RDONLY | PG_BINARY);
	SavedHeader header;
	SavedRange *ranges = NULL;
	size_t		size;

	if (fd < 0)
		return NULL;
	if (pg_pread(fd, &header, sizeof(header), 0) == sizeof(header) &&
		header.magic == SAVED_MAGIC && header.version == SAVED_VERSION)
	{
		size = header.nsections * sizeof(SavedRange);
		ranges = palloc_extended(Max(size, 1), MCXT_ALLOC_NO_OOM | MCXT_ALLOC_HUGE);
		if (ranges != NULL &&
			pg_pread(fd, ranges, size, sizeof(header) + header.length - size) != size)
		{
			pfree(ranges);
			ranges = NULL;
		}
		*nranges = header.nsections;
	}
	CloseTransientFile(fd);
	return ranges;
}

/*
 * Get the time by which the system clock has been set back since the file was
 * written, as far as we can see.  The file's times are moved by that, so that
 * no key is due later than it was when the server stopped.
 */
int64
savefile_set_back_by(const SavedHeader *header, TimestampTz now)
{
	return Max(header->saved_at - now, 0);
}

/* ------------------------------------------------------------------------
 * Writing
 * ------------------------------------------------------------------------
 */

/*
 * Begin to write a file, which is only created when there is something in it.
 * The functions for writing raise an error if that fails.
 */
SavedWriter *
savefile_begin(TimestampTz now)
{
	SavedWriter *writer = palloc0(sizeof(SavedWriter));

	writer->fd = -1;
	writer->header.magic = SAVED_MAGIC;
	writer->header.version = SAVED_VERSION;
	writer->header.system_identifier = GetSystemIdentifier();
	writer->header.timeline = GetWALInsertionTimeLine();
	writer->header.saved_at = now;
	INIT_CRC32C(writer->header.crc);

	/* more than a portion of long keys makes of it */
	writer->allocated = 4 * WRITE_SIZE;
	writer->data = palloc(writer->allocated);
	return writer;
}

static void
write_exactly(SavedWriter *writer, const void *data, size_t size, uint64 offset)
{
	ssize_t		done;

	errno = 0;
	done = pg_pwrite(writer->fd, data, size, (off_t) offset);
	if (done == size)
		return;

	/* if it was cut off, there is no space */
	if (errno == 0)
		errno = ENOSPC;
	ereport(ERROR,
			(errcode_for_file_access(),
			 errmsg("could not write to file \"%s\": %m",
					SAVED_TEMP_FILE)));
}

/*
 * Have the kernel begin to write to disk what was written to the file before
 * this offset.  Not by pg_flush_data(), for which an error is a PANIC.
 */
static void
begin_sync(SavedWriter *writer, uint64 offset)
{
#ifdef HAVE_SYNC_FILE_RANGE
	if (enableFsync &&
		sync_file_range(writer->fd, writer->synced, offset - writer->synced,
						SYNC_FILE_RANGE_WRITE) != 0 &&
		errno != ENOSYS)
		ereport(ERROR,
				(errcode_for_file_access(),
				 errmsg("could not write to file \"%s\": %m",
						SAVED_TEMP_FILE)));
#endif
	writer->synced = offset;
}

/*
 * Write what is complete, and tell the kernel from time to time to write it to
 * disk, so that there is less to wait for in the end.
 */
static void
write_out(SavedWriter *writer)
{
	uint64		offset = sizeof(SavedHeader) + writer->header.length;

	if (writer->size == 0)
		return;
	if (writer->fd < 0)
	{
		writer->fd = OpenTransientFile(SAVED_TEMP_FILE,
									   O_RDWR | O_CREAT | O_TRUNC | PG_BINARY);
		if (writer->fd < 0)
			ereport(ERROR,
					(errcode_for_file_access(),
					 errmsg("could not create file \"%s\": %m",
							SAVED_TEMP_FILE)));
		writer->synced = sizeof(SavedHeader);
	}
	COMP_CRC32C(writer->header.crc, writer->data, writer->size);

	/* the header comes last */
	write_exactly(writer, writer->data, writer->size, offset);
	writer->header.length += writer->size;
	offset += writer->size;
	writer->size = 0;
	if (offset - writer->synced >= FLUSH_SIZE)
		begin_sync(writer, offset);
}

/* Get space for so many bytes at the end of what is to be written. */
static inline char *
make_room(SavedWriter *writer, size_t size)
{
	if (unlikely(writer->size + size > writer->allocated))
	{
		writer->allocated = 2 * writer->allocated + size;
		writer->data = repalloc(writer->data, writer->allocated);
	}
	return writer->data + writer->size;
}

static void
put(SavedWriter *writer, const void *data, size_t size)
{
	memcpy(make_room(writer, size), data, size);
	writer->size += size;
}

/* Close the block, if there is one.  The next one begins at this position. */
static void
close_block(SavedWriter *writer, uint64 position)
{
	SavedBlock *block = &writer->in_block;

	if (block->nkeys > 0)
	{
		block->kind = RECORD_BLOCK;
		block->size = writer->size - writer->block - sizeof(SavedBlock);
		block->end = position;
		memcpy(writer->data + writer->block, block, sizeof(SavedBlock));
		block->nkeys = 0;
	}
	writer->position = position;
}

/* Close the section, if there is one. */
static void
close_section(SavedWriter *writer)
{
	uint32		n = writer->header.nsections;

	close_block(writer, SAVED_LAST_POSITION);
	if (n > 0)
		writer->ranges[n - 1].end = sizeof(SavedHeader) +
			writer->header.length + writer->size;
}

/*
 * Put a section, to which the keys that follow belong, none of which is below
 * this position.  This and savefile_put_key() only write to memory.
 */
void
savefile_put_section(SavedWriter *writer, const SavedSection *section,
					 const KeyShape *shape, uint64 position)
{
	uint32		n = writer->header.nsections;
	SavedRange *range;

	close_section(writer);
	if (n == 0)
		writer->ranges = palloc(64 * sizeof(SavedRange));
	else if (n >= 64 && (n & (n - 1)) == 0)
		writer->ranges = repalloc_huge(writer->ranges,
									   2 * (Size) n * sizeof(SavedRange));
	range = &writer->ranges[n];
	range->dboid = section->dboid;
	range->relid = section->relid;
	range->begin = sizeof(SavedHeader) + writer->header.length + writer->size;
	writer->header.nsections++;
	put(writer, section, sizeof(SavedSection));
	put(writer, shape, section->shape_size);
	writer->position = position;
}

/* Put a key. */
void
savefile_put_key(SavedWriter *writer, const SavedKey *key)
{
	SavedBlock *block = &writer->in_block;
	uint16		len = KEY_LENGTH(key->len);
	char	   *to;

	if (block->nkeys == 0)
	{
		block->begin = writer->position;
		(void) make_room(writer, sizeof(SavedBlock));
		writer->block = writer->size;
		writer->size += sizeof(SavedBlock);
	}
	to = make_room(writer, PACKED_MAX(len));
	memcpy(to, &key->len, sizeof(key->len));
	to = pack_number(to + sizeof(key->len), fold_sign(key->count));
	to = pack_number(to, pack_time(&writer->header, key->counted_at));
	memcpy(to, key->data, len);
	writer->size = to + len - writer->data;
	block->nkeys++;
	writer->header.nkeys++;
}

/*
 * All keys of the section that are below this position were put, and no others.
 * Writes when there is enough to write.
 */
void
savefile_end_portion(SavedWriter *writer, uint64 position)
{
	bool		is_large = writer->in_block.nkeys > 0 &&
	writer->size - writer->block >= BLOCK_SIZE;

	/* a block has keys of one partition only */
	if (is_large || position >> 32 != writer->position >> 32)
		close_block(writer, position);
	else if (writer->in_block.nkeys == 0)
		writer->position = position;
	if (writer->in_block.nkeys == 0 && writer->size >= WRITE_SIZE)
		write_out(writer);
}

/*
 * Write the rest and the header, and sync and close the file, which still has
 * its temporary name.  Returns false if there is nothing in it; then there is
 * no file.
 */
bool
savefile_finish(SavedWriter *writer)
{
	SavedHeader *header = &writer->header;

	if (header->nkeys == 0 && writer->fd < 0)
		return false;
	close_section(writer);
	put(writer, writer->ranges, header->nsections * sizeof(SavedRange));
	write_out(writer);
	COMP_CRC32C(header->crc, header, offsetof(SavedHeader, crc));
	FIN_CRC32C(header->crc);
	write_exactly(writer, header, sizeof(SavedHeader), 0);
	if (pg_fsync(writer->fd) != 0)
		ereport(ERROR,
				(errcode_for_file_access(),
				 errmsg("could not fsync file \"%s\": %m", SAVED_TEMP_FILE)));
	if (CloseTransientFile(writer->fd) != 0)
		ereport(ERROR,
				(errcode_for_file_access(),
				 errmsg("could not close file \"%s\": %m", SAVED_TEMP_FILE)));
	return true;
}
