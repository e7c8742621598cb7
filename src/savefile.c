/*-------------------------------------------------------------------------
 *
 * savefile.c
 *	  The file of counts that were not stored at a shutdown: its format.
 *
 * The file has a header with the length and the checksum of everything, then
 * sections, one for each buffer and shape of its keys, each with its keys.  It
 * is written under a temporary name, synced, and renamed when it is complete.
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

#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "access/xlog.h"
#include "miscadmin.h"
#include "savefile.h"
#include "storage/fd.h"

#define SAVED_MAGIC			0x53425346

/* increase this with every change of the format */
#define SAVED_VERSION		2

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
	for (uint64 left = header->length; left > 0;)
	{
		char		data[8192];
		size_t		size = Min(left, sizeof(data));

		if (fread(data, 1, size, file) != size)
			return psprintf(_("It could not be read: %s."), strerror(errno));
		COMP_CRC32C(crc, data, size);
		left -= size;
	}
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
 * Reading
 * ------------------------------------------------------------------------
 */

/*
 * Open a file for reading, from an offset on.  This and the other functions
 * for reading raise an error if that fails, or if the file is not as expected.
 */
FILE *
savefile_open(const char *name, int64 offset)
{
	FILE	   *file = AllocateFile(name, PG_BINARY_R);

	if (file == NULL || fseeko(file, (off_t) offset, SEEK_SET) != 0)
		ereport(ERROR,
				(errcode_for_file_access(),
				 errmsg("could not open file \"%s\": %m", name)));
	return file;
}

static void
read_exactly(FILE *file, void *data, size_t size)
{
	size_t		done = fread(data, 1, size, file);

	if (done == size)
		return;
	if (ferror(file))
		ereport(ERROR,
				(errcode_for_file_access(),
				 errmsg("could not read file \"%s\": %m",
						SAVED_LOADING_FILE)));
	ereport(ERROR,
			(errcode(ERRCODE_DATA_CORRUPTED),
			 errmsg("could not read file \"%s\": read %zu of %zu",
					SAVED_LOADING_FILE, done, size)));
}

/* Read the header of a file, which savefile_check() has checked. */
void
savefile_read_header(FILE *file, SavedHeader *header)
{
	read_exactly(file, header, sizeof(SavedHeader));
}

/*
 * Read the next record, without the shape or key that follows it.  Returns
 * false at the end of the file.
 */
bool
savefile_read_record(FILE *file, SavedRecord *record)
{
	size_t		size = fread(&record->kind, 1, sizeof(record->kind), file);

	if (size == 0 && feof(file))
		return false;
	if (size != sizeof(record->kind))
		ereport(ERROR,
				(errcode_for_file_access(),
				 errmsg("could not read file \"%s\": %m",
						SAVED_LOADING_FILE)));
	size = record->kind == RECORD_SECTION ? sizeof(SavedSection) :
		sizeof(SavedKey);
	read_exactly(file, (char *) record + sizeof(record->kind),
				 size - sizeof(record->kind));
	return true;
}

/*
 * Read the shape that follows a section.  The result is in the current memory
 * context.
 */
KeyShape *
savefile_read_shape(FILE *file, const SavedSection *section)
{
	KeyShape   *shape;

	if (section->shape_size > SHAPE_MAX_SIZE ||
		section->shape_size < offsetof(KeyShape, data))
		elog(ERROR, "unexpected shape in file \"%s\"", SAVED_LOADING_FILE);
	shape = palloc(section->shape_size);
	read_exactly(file, shape, section->shape_size);
	if (!shape_is_valid(shape, section->shape_size))
		elog(ERROR, "unexpected shape in file \"%s\"", SAVED_LOADING_FILE);
	return shape;
}

/* Read the bytes of a key, which follow its record. */
void
savefile_read_key(FILE *file, const SavedKey *key, KeySpace *space)
{
	if (key->kind != RECORD_KEY ||
		KEY_LENGTH(key->keylen) > sizeof(space->data))
		elog(ERROR, "unexpected record in file \"%s\"", SAVED_LOADING_FILE);
	read_exactly(file, space->data, KEY_LENGTH(key->keylen));
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
 * Begin to write a file, which is only created when something is put into it.
 * The functions for writing raise an error if that fails.
 */
SavedWriter *
savefile_begin(TimestampTz now)
{
	SavedWriter *writer = palloc0(sizeof(SavedWriter));

	writer->header.magic = SAVED_MAGIC;
	writer->header.version = SAVED_VERSION;
	writer->header.system_identifier = GetSystemIdentifier();
	writer->header.timeline = GetWALInsertionTimeLine();
	writer->header.saved_at = now;
	INIT_CRC32C(writer->header.crc);
	return writer;
}

static void
put(SavedWriter *writer, const void *data, size_t size)
{
	if (writer->file == NULL)
	{
		writer->file = AllocateFile(SAVED_TEMP_FILE, PG_BINARY_W);
		if (writer->file == NULL)
			ereport(ERROR,
					(errcode_for_file_access(),
					 errmsg("could not create file \"%s\": %m",
							SAVED_TEMP_FILE)));

		/* the header comes last */
		if (fseeko(writer->file, sizeof(SavedHeader), SEEK_SET) != 0)
			elog(ERROR, "could not seek in file \"%s\"", SAVED_TEMP_FILE);
	}
	if (fwrite(data, 1, size, writer->file) != size)
		ereport(ERROR,
				(errcode_for_file_access(),
				 errmsg("could not write to file \"%s\": %m",
						SAVED_TEMP_FILE)));
	COMP_CRC32C(writer->header.crc, data, size);
	writer->header.length += size;
}

/* Write a section, to which the keys that follow belong. */
void
savefile_put_section(SavedWriter *writer, const SavedSection *section,
					 const KeyShape *shape)
{
	put(writer, section, sizeof(SavedSection));
	put(writer, shape, section->shape_size);
	writer->header.nsections++;
}

/* Write a key, with its stored form. */
void
savefile_put_key(SavedWriter *writer, const SavedKey *key, const char *data)
{
	put(writer, key, sizeof(SavedKey));
	put(writer, data, KEY_LENGTH(key->keylen));
	writer->header.nkeys++;
}

/*
 * Write the header, and sync and close the file.  It still has its temporary
 * name.
 */
void
savefile_finish(SavedWriter *writer)
{
	SavedHeader *header = &writer->header;

	COMP_CRC32C(header->crc, header, offsetof(SavedHeader, crc));
	FIN_CRC32C(header->crc);
	if (fseeko(writer->file, 0, SEEK_SET) != 0 ||
		fwrite(header, 1, sizeof(SavedHeader), writer->file) != sizeof(SavedHeader) ||
		fflush(writer->file) != 0)
		ereport(ERROR,
				(errcode_for_file_access(),
				 errmsg("could not write to file \"%s\": %m",
						SAVED_TEMP_FILE)));
	if (pg_fsync(fileno(writer->file)) != 0)
		ereport(ERROR,
				(errcode_for_file_access(),
				 errmsg("could not fsync file \"%s\": %m", SAVED_TEMP_FILE)));
	if (FreeFile(writer->file) != 0)
		ereport(ERROR,
				(errcode_for_file_access(),
				 errmsg("could not close file \"%s\": %m", SAVED_TEMP_FILE)));
}
