/*-------------------------------------------------------------------------
 *
 * saved.c
 *	  The file of counts that were not stored at shutdown.
 *
 * A clean shutdown writes what is counted and not yet stored to a file in the
 * data directory, and the launcher of the next start reads it.  Each count is
 * to be found in one place at any time: in the file, or in memory.
 *
 * Writing: to a temporary name, with a header that tells the length and the
 * checksum, synced, then renamed.
 *
 * Reading: the file is checked as a whole.  If it is good, it is renamed
 * before anything in it is counted; under the new name nobody reads it after
 * a crash, when some of it may have been flushed already.  (What a crash costs
 * is what was not yet stored.)  How far it was read stands in shared memory,
 * so that another launcher can go on, and what was not read when the server
 * stops is copied to the next file.  A file that is not good is set aside
 * under a name of its own, and counting begins without it.
 *
 * The file belongs to one timeline of one database cluster.  A standby, or a
 * restored backup, that came by a copy of the file may have received by
 * replication what the primary has meanwhile stored of it.
 *
 * Only the launcher, or who acts as it, calls saved_load() and saved_write().
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "access/xact.h"
#include "access/xlog.h"
#include "counters.h"
#include "key.h"
#include "miscadmin.h"
#include "port/pg_crc32c.h"
#include "postmaster/interrupt.h"
#include "saved.h"
#include "shared.h"
#include "storage/fd.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#define SAVED_TEMP_FILE		"statbuffer.saved.tmp"

#define SAVED_MAGIC			0x53425346
#define SAVED_VERSION		2

/* how long to wait for transactions that are just about to commit */
#define UNPIN_WAIT_MSECS	10000

/* what is told in the log again only after so long */
#define LOG_AGAIN_MSECS		60000

/* SharedControl.saved_state */
#define STATE_UNKNOWN		0	/* nobody has looked whether there is a file */
#define STATE_LOADING		1	/* it has the other name now */
#define STATE_DONE			2	/* what was in it is in memory */
#define STATE_SAVED			3	/* and what is in memory is in a new file */

typedef struct SavedHeader
{
	uint32		magic;
	uint32		version;
	uint64		system_identifier;
	uint64		length;			/* of all that follows the header */
	uint64		nkeys;
	TimestampTz saved_at;
	TimeLineID	timeline;
	uint32		nsections;
	pg_crc32c	crc;			/* of what follows, and the fields above */
} SavedHeader;

/*
 * What follows the header are records.  A section tells to which buffer, and
 * to which shape of it, the keys belong that come after it.  The shape, a
 * KeyShape, follows the section.
 */
#define RECORD_SECTION		1
#define RECORD_KEY			2

typedef struct SavedSection
{
	uint32		kind;
	Oid			dboid;
	Oid			relid;
	Oid			owner;
	uint32		shape_size;
	uint32		unused;			/* 0 */
	int64		interval;		/* in microseconds */
} SavedSection;

/* Followed by the key. */
typedef struct SavedKey
{
	uint32		kind;
	uint32		keylen;			/* as in KeyBytes */
	int64		count;
	TimestampTz counted_at;		/* by the clock of saved_at; 0: due at once */
} SavedKey;

typedef union SavedRecord
{
	uint32		kind;
	SavedSection section;
	SavedKey	key;
} SavedRecord;

StaticAssertDecl(offsetof(SavedHeader, crc) % 8 == 0 &&
				 sizeof(SavedSection) == 32 && sizeof(SavedKey) == 24,
				 "what is written must have no holes");

/* A file that is being written. */
typedef struct SavedWriter
{
	FILE	   *file;
	SavedHeader header;
	int64		to_timestamp;	/* clock_to_timestamp() at saved_at */
	SavedSection section;
	const KeyShape *shape;		/* of the section */
	bool		section_written;
} SavedWriter;

/* ------------------------------------------------------------------------
 * Taking a file over
 * ------------------------------------------------------------------------
 */

static void
set_state(uint32 state)
{
	pg_atomic_write_u32(&shared_control->saved_state, state);
	if (state >= STATE_DONE)
		ConditionVariableBroadcast(&shared_control->saved_cv);
}

static bool
file_exists(const char *name)
{
	return access(name, F_OK) == 0 || errno != ENOENT;
}

static void
remove_file(const char *name)
{
	if (file_exists(name))
		(void) durable_unlink(name, WARNING);
}

/* What is wrong with an open file, or NULL; see check_file(). */
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

/* Check a file as a whole.  Returns what is wrong with it, or NULL. */
static const char *
check_file(const char *name, SavedHeader *header)
{
	FILE	   *file = AllocateFile(name, PG_BINARY_R);
	const char *reason;

	if (file == NULL)
		return psprintf(_("It could not be read: %s."), strerror(errno));
	reason = check_open_file(file, header);
	FreeFile(file);
	return reason;
}

/* Give a file that can't be used a name under which nobody reads it. */
static void
set_aside(const char *name, const char *reason)
{
	char		aside[MAXPGPATH];
	long		number = (long) time(NULL);

	do
		snprintf(aside, sizeof(aside), "%s.%ld", name, number++);
	while (file_exists(aside));

	/* not durably, which takes reading it */
	if (rename(name, aside) != 0)
	{
		ereport(WARNING,
				(errcode_for_file_access(),
				 errmsg("could not rename file \"%s\" to \"%s\": %m",
						name, aside),
				 errdetail("%s", reason),
				 errhint("Counts of the next shutdown will overwrite it.")));
		return;
	}
	ereport(WARNING,
			(errcode(ERRCODE_DATA_CORRUPTED),
			 errmsg("file \"%s\" with counts of the last shutdown can't be used",
					name),
			 errdetail("%s", reason),
			 errhint("It has been renamed to \"%s\"; the counts in it are not stored.",
					 aside)));
}

/* Only a crash leaves these. */
static void
remove_remains(void)
{
	remove_file(SAVED_TEMP_FILE);
	remove_file(SAVED_LOADING_FILE);
}

/*
 * If there is a file that can be used, take it over, so that it is to be
 * read.  Returns whether there is something to read.  Who only copies it
 * leaves it its name, and so it is still there when that fails.
 */
static bool
take_over(bool to_load)
{
	uint32		state = pg_atomic_read_u32(&shared_control->saved_state);
	SavedHeader header;
	const char *reason;

	if (state == STATE_LOADING)
		return true;

	remove_remains();
	if (!file_exists(SAVED_FILE))
		return false;
	reason = check_file(SAVED_FILE, &header);
	if (reason != NULL)
	{
		set_aside(SAVED_FILE, reason);
		return false;
	}

	/* known before the name is gone: see saved_is_pending() */
	shared_control->saved_section = 0;
	shared_control->saved_offset = sizeof(SavedHeader);
	if (!to_load)
		return true;
	set_state(STATE_LOADING);
	if (durable_rename(SAVED_FILE, SAVED_LOADING_FILE, LOG) != 0)
	{
		/*
		 * It may have been renamed and not synced.  Then it is to have the
		 * old name again, because nobody reads it under the new one if the
		 * state is as before.
		 */
		if (file_exists(SAVED_FILE) ||
			rename(SAVED_LOADING_FILE, SAVED_FILE) == 0)
			set_state(state);
		ereport(ERROR,
				(errcode_for_file_access(),
				 errmsg("could not rename file \"%s\" to \"%s\"",
						SAVED_FILE, SAVED_LOADING_FILE)));
	}
	return true;
}

/*
 * Is there a file that has not, or not wholly, been read?  Called by any
 * process that is attached to SharedControl.
 */
bool
saved_is_pending(void)
{
	uint32		state = pg_atomic_read_u32(&shared_control->saved_state);

	if (likely(state >= STATE_DONE))
		return false;
	if (state == STATE_LOADING || file_exists(SAVED_FILE))
		return true;
	return !pg_atomic_compare_exchange_u32(&shared_control->saved_state,
										   &state, STATE_DONE) &&
		state < STATE_DONE;
}

/* ------------------------------------------------------------------------
 * Loading
 * ------------------------------------------------------------------------
 */

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

static FILE *
open_loading(int64 offset)
{
	bool		renamed = pg_atomic_read_u32(&shared_control->saved_state) == STATE_LOADING;
	const char *name = renamed ? SAVED_LOADING_FILE : SAVED_FILE;
	FILE	   *file = AllocateFile(name, PG_BINARY_R);

	if (file == NULL || fseeko(file, (off_t) offset, SEEK_SET) != 0)
		ereport(ERROR,
				(errcode_for_file_access(),
				 errmsg("could not open file \"%s\": %m", name)));
	return file;
}

/* Read the next record up to the key; false at the end of the file. */
static bool
read_record(FILE *file, SavedRecord *record)
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

/* Read the shape that follows a section. */
static KeyShape *
read_shape(FILE *file, const SavedSection *section)
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

/*
 * How far the system's clock has been set back since a file was written, as
 * far as can be told.  Its times are moved by that, so that nothing is due
 * later than it was to be when the server stopped.
 */
static int64
set_back_by(const SavedHeader *header, TimestampTz now)
{
	return Max(header->saved_at - now, 0);
}

/* Count a key, as if it had just been committed. */
static void
load_key(SharedBuffer *buffer, CounterTable *table, SavedSection *section,
		 SavedKey *saved, const char *data, int64 to_timestamp)
{
	ClockTime	counted_at = Max(saved->counted_at - to_timestamp, 1);
	KeyBytes	key = {data, saved->keylen, key_hash(data, saved->keylen)};
	CounterPin	pin;

	if (saved->counted_at == 0)
		counted_at = clock_now() - section->interval;
	counters_pin(buffer, table, &key, saved->count, PG_INT64_MAX, &pin);

	/* before the key, so that the sums never show less than was stored */
	pg_atomic_fetch_add_u64(&buffer->stats[STAT_PUBLISHED],
							(uint64) saved->count);
	if (!counters_add(buffer, &pin, saved->count))
		counters_schedule(buffer, &pin, counted_at,
						  counted_at + section->interval);
}

/*
 * Go on with the open file.  Stops when a buffer has a worker, as only who acts
 * as the worker may work in a table without a lock on the relation; and when
 * the server may be stopping.
 */
static SavedProgress
load_records(FILE *file, CounterTable *table)
{
	SavedHeader header;
	SavedRecord record;
	SavedSection section = {0};
	SharedBuffer *buffer = NULL;
	int64		offset = shared_control->saved_offset;
	int64		to_timestamp;
	bool		in_section = shared_control->saved_section != 0;
	int			n = 0;

	read_exactly(file, &header, sizeof(header));
	to_timestamp = clock_to_timestamp() +
		set_back_by(&header, GetCurrentTimestamp());

	if (fseeko(file, in_section ? shared_control->saved_section : offset,
			   SEEK_SET) != 0)
		elog(ERROR, "could not seek in file \"%s\"", SAVED_LOADING_FILE);
	while (read_record(file, &record))
	{
		KeySpace	space;

		if (record.kind == RECORD_SECTION)
		{
			KeyShape   *shape;

			shared_release_claims(0);
			if (table->dshash != NULL)
				dshash_detach(table->dshash);
			table->dshash = NULL;

			section = record.section;
			shape = read_shape(file, &section);
			shared_make_buffer(section.dboid, section.relid, section.owner,
							   section.interval);
			buffer = shared_claim_worker(section.dboid, section.relid);
			if (buffer == NULL)
				return SAVED_BLOCKED;
			shared_find_shape(buffer, shape, true, table);
			if (table->shape == SHARED_SHAPES)
				elog(ERROR, "too many shapes of buffer %u", section.relid);
			counters_attach_table(buffer, table);
			pfree(shape);

			if (in_section)
			{
				/* where the one before us stopped */
				in_section = false;
				if (fseeko(file, offset, SEEK_SET) != 0)
					elog(ERROR, "could not seek in file \"%s\"",
						 SAVED_LOADING_FILE);
				continue;
			}
			shared_control->saved_section = offset;
			offset += sizeof(SavedSection) + section.shape_size;
			shared_control->saved_offset = offset;
			continue;
		}

		if (record.kind != RECORD_KEY || buffer == NULL ||
			KEY_LENGTH(record.key.keylen) > sizeof(space.data))
			elog(ERROR, "unexpected record in file \"%s\"",
				 SAVED_LOADING_FILE);
		read_exactly(file, space.data, KEY_LENGTH(record.key.keylen));
		load_key(buffer, table, &section, &record.key, space.data,
				 to_timestamp);

		/* nothing between the two can fail or be interrupted */
		offset += sizeof(SavedKey) + KEY_LENGTH(record.key.keylen);
		shared_control->saved_offset = offset;
		if (++n % 1000 == 0)
		{
			CHECK_FOR_INTERRUPTS();
			if (ShutdownRequestPending)
				return SAVED_BLOCKED;
		}
	}

	ereport(LOG,
			(errmsg("statbuffer has loaded the counts that were saved at the last shutdown"),
			 errdetail_plural("They were of %llu key.", "They were of %llu keys.",
							  header.nkeys,
							  (unsigned long long) header.nkeys)));
	return SAVED_LOADED;
}

/* Load what there is, as far as that goes. */
static SavedProgress
load(CounterTable *table)
{
	SavedProgress progress;
	FILE	   *file;

	if (!take_over(true))
		return SAVED_LOADED;
	file = open_loading(0);
	progress = load_records(file, table);
	FreeFile(file);
	if (progress == SAVED_LOADED)
		remove_file(SAVED_LOADING_FILE);
	return progress;
}

/*
 * Load the counts that the last shutdown has saved.  When that is not
 * possible, or not all of it, it is to be called again: if it is blocked, when
 * a worker has left, or when it has failed, later, as memory may be out.  What
 * has gone wrong is in the log.
 */
SavedProgress
saved_load(void)
{
	static ClockTime last_logged = 0;
	MemoryContext context = CurrentMemoryContext;
	CounterTable table = {.dshash = NULL};
	volatile SavedProgress progress = SAVED_FAILED;

	/* a session may have seen that there is no file */
	if (pg_atomic_read_u32(&shared_control->saved_state) >= STATE_DONE)
	{
		remove_remains();
		return SAVED_LOADED;
	}

	StartTransactionCommand();
	PG_TRY();
	{
		progress = load(&table);
		if (progress == SAVED_LOADED)
		{
			/* who waits for it must not take our last claim for a worker */
			shared_release_claims(0);
			set_state(STATE_DONE);
		}
		CommitTransactionCommand();
	}
	PG_CATCH();
	{
		ErrorData  *edata;
		ClockTime	now = clock_now();

		MemoryContextSwitchTo(context);
		edata = CopyErrorData();
		FlushErrorState();
		AbortCurrentTransaction();
		LWLockReleaseAll();
		if (last_logged == 0 ||
			clock_passed(last_logged, now, LOG_AGAIN_MSECS))
		{
			ereport(LOG,
					(errcode(edata->sqlerrcode),
					 errmsg("statbuffer could not load all counts of the last shutdown yet: %s",
							edata->message),
					 edata->detail ?
					 errdetail_internal("%s", edata->detail) : 0,
					 edata->hint ? errhint("%s", edata->hint) : 0));
			last_logged = now;
		}
		FreeErrorData(edata);
	}
	PG_END_TRY();
	if (table.dshash != NULL)
		dshash_detach(table.dshash);
	shared_release_claims(0);
	MemoryContextSwitchTo(context);
	return progress;
}

/* ------------------------------------------------------------------------
 * Saving
 * ------------------------------------------------------------------------
 */

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

/* Called under a partition lock. */
static void
write_key(const CounterInfo *info, void *arg)
{
	SavedWriter *writer = arg;
	SavedKey	key = {
		.kind = RECORD_KEY,
		.keylen = info->keylen,
		.count = info->count,
		/* a restart is a reason to try a failing key again */
		.counted_at = info->failures > 0 || info->counted_at == 0 ? 0 :
		info->counted_at + writer->to_timestamp
	};

	Assert(info->in_flight == 0);
	if (info->count == 0)
		return;
	if (!writer->section_written)
	{
		put(writer, &writer->section, sizeof(SavedSection));
		put(writer, writer->shape, writer->section.shape_size);
		writer->section_written = true;
		writer->header.nsections++;
	}
	put(writer, &key, sizeof(key));
	put(writer, info->key, KEY_LENGTH(info->keylen));
	writer->header.nkeys++;
}

static void
write_buffer(SavedWriter *writer, SharedBufferKey key)
{
	SharedBuffer *buffer = shared_claim_worker(key.dboid, key.relid);
	CounterTable table = {.dshash = NULL};

	if (buffer == NULL)
		return;
	counters_attach_table(buffer, &table);
	if (!counters_wait_unpinned(buffer, &table,
								clock_add(clock_now(), UNPIN_WAIT_MSECS)))
		ereport(WARNING,
				(errmsg("a transaction that is about to commit keeps statbuffer from saving counts"),
				 errdetail("What it has counted is lost if it commits.")));
	for (int shape = 0; shape < SHARED_SHAPES; shape++)
	{
		/* who would remove it has the claim that we have */
		writer->shape = dsa_get_address(shared_area, buffer->shapes[shape]);
		if (writer->shape == NULL)
			continue;
		writer->section.kind = RECORD_SECTION;
		writer->section.dboid = key.dboid;
		writer->section.relid = key.relid;
		writer->section.owner = pg_atomic_read_u32(&buffer->owner);
		writer->section.shape_size = writer->shape->size;
		writer->section.interval = buffer->schedule.interval;
		writer->section_written = false;
		table.readable = (uint32) 1 << shape;
		counters_scan(buffer, &table, write_key, writer);
	}
	dshash_detach(table.dshash);
	shared_release_worker(buffer, 0);
}

/* Copy a section that was read, with its shape, which is still to be read. */
static void
copy_section(SavedWriter *writer, FILE *file, const SavedSection *section)
{
	KeyShape   *shape = read_shape(file, section);

	put(writer, section, sizeof(SavedSection));
	put(writer, shape, section->shape_size);
	writer->header.nsections++;
	pfree(shape);
}

/* Copy what is left of a file that could not be loaded completely. */
static void
copy_rest(SavedWriter *writer)
{
	SavedHeader header;
	SavedRecord record;
	FILE	   *file;

	file = open_loading(0);
	read_exactly(file, &header, sizeof(header));
	FreeFile(file);
	if (shared_control->saved_section != 0)
	{
		file = open_loading(shared_control->saved_section);
		(void) read_record(file, &record);
		copy_section(writer, file, &record.section);
		FreeFile(file);
	}
	file = open_loading(shared_control->saved_offset);
	while (read_record(file, &record))
	{
		KeySpace	space;

		if (record.kind == RECORD_SECTION)
		{
			copy_section(writer, file, &record.section);
			continue;
		}
		read_exactly(file, space.data, KEY_LENGTH(record.key.keylen));
		if (record.key.counted_at != 0)
			record.key.counted_at -= set_back_by(&header, writer->header.saved_at);
		put(writer, &record, sizeof(SavedKey));
		put(writer, space.data, KEY_LENGTH(record.key.keylen));
		writer->header.nkeys++;
	}
	FreeFile(file);
}

/*
 * See that all commits are on disk, those, too, that did not wait for it: a
 * commit that does comes after them.  As this one makes no change, it waits
 * for no standby.
 */
static void
sync_commits(void)
{
	StartTransactionCommand();
	(void) GetCurrentTransactionId();
	ForceSyncCommit();
	CommitTransactionCommand();
}

/* The header, and the name. */
static void
finish_file(SavedWriter *writer)
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

	/*
	 * The server may yet die before its last checkpoint.  Then, too, what is
	 * in the file must have been committed, and what is not, stored.
	 */
	sync_commits();

	/*
	 * Another launcher may have been on its way when this one was told to
	 * end, and come up only now.  Even if this fails, when the file may have
	 * its name already, that one must not add the same counts to it.
	 */
	set_state(STATE_SAVED);
	(void) durable_rename(SAVED_TEMP_FILE, SAVED_FILE, ERROR);
}

static void
saving_context(void *arg)
{
	errcontext("saving counts that are not yet stored; they are lost if it fails");
}

/*
 * Save all that is held, and what is left of the last file.  Writes no file
 * when there is nothing, or when it has been done.  The caller has closed the
 * counters, and ends.
 */
void
saved_write(void)
{
	ErrorContextCallback callback = {
		.previous = error_context_stack,
		.callback = saving_context
	};
	SavedWriter *writer;
	List	   *keys = NIL;
	ListCell   *lc;
	dshash_seq_status status;
	SharedBuffer *buffer;
	bool		rest;

	Assert(pg_atomic_read_u32(&shared_control->closed) != 0);
	if (pg_atomic_read_u32(&shared_control->saved_state) == STATE_SAVED)
		return;

	MemoryContextSwitchTo(AllocSetContextCreate(TopMemoryContext,
												"statbuffer saving",
												ALLOCSET_DEFAULT_SIZES));
	error_context_stack = &callback;

	writer = palloc0(sizeof(SavedWriter));
	writer->header.magic = SAVED_MAGIC;
	writer->header.version = SAVED_VERSION;
	writer->header.system_identifier = GetSystemIdentifier();
	writer->header.timeline = GetWALInsertionTimeLine();
	writer->header.saved_at = GetCurrentTimestamp();
	writer->to_timestamp = writer->header.saved_at - clock_now();
	INIT_CRC32C(writer->header.crc);

	/* a file that was never read must not be overwritten */
	rest = take_over(false);

	dshash_seq_init(&status, shared_registry, false);
	while ((buffer = dshash_seq_next(&status)) != NULL)
	{
		SharedBufferKey *key = palloc(sizeof(SharedBufferKey));

		*key = buffer->key;
		keys = lappend(keys, key);
	}
	dshash_seq_term(&status);
	foreach(lc, keys)
		write_buffer(writer, *(SharedBufferKey *) lfirst(lc));
	if (rest)
		copy_rest(writer);

	if (writer->file != NULL)
		finish_file(writer);
	if (rest)
		remove_file(SAVED_LOADING_FILE);
	error_context_stack = callback.previous;

	if (writer->file != NULL)
		ereport(LOG,
				(errmsg("statbuffer has saved counts that are not yet stored"),
				 errdetail_plural("They are of %llu key.", "They are of %llu keys.",
								  writer->header.nkeys,
								  (unsigned long long) writer->header.nkeys)));
}
