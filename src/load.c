/*-------------------------------------------------------------------------
 *
 * load.c
 *	  Loading the counts that the last shutdown has saved.
 *
 * Each count is to be found in one place at any time: in the file, or in
 * memory.  The file is checked as a whole.  If it is good, it is renamed before
 * anything in it is counted: under the new name nobody reads it after a crash,
 * when some of it may have been flushed already.  (A crash costs what was not
 * yet stored.)  The position up to which it was read is in shared memory, so
 * that another launcher can go on, and so that what was not read when the server
 * stops is copied to the next file.  A file that is not good is set aside under
 * another name, and counting begins without it.
 *
 * Its states, in SharedLoad.state:
 *
 *		unknown		nobody has looked whether there is a file
 *		loading		the file has the other name, and is being read
 *		loaded		everything that was in it is in memory
 *		saved		and everything that is in memory is in a new file
 *
 * From unknown it goes to loading, or if there is no file, to loaded; anyone may
 * do the latter.  All else is done by the launcher, or by the process that acts
 * as the launcher.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <unistd.h>

#include "access/xact.h"
#include "counters.h"
#include "load.h"
#include "miscadmin.h"
#include "postmaster/interrupt.h"
#include "registry.h"
#include "savefile.h"
#include "storage/fd.h"
#include "utils/memutils.h"

/* an error is logged again after this */
#define LOG_AGAIN_MSECS		60000

/* SharedLoad.state */
#define STATE_UNKNOWN		0
#define STATE_LOADING		1
#define STATE_LOADED		2
#define STATE_SAVED			3

static void
set_state(uint32 state)
{
	pg_atomic_write_u32(&shared_control->load.state, state);
	if (state >= STATE_LOADED)
		ConditionVariableBroadcast(&shared_control->load.cv);
}

/* Only a crash leaves these. */
static void
remove_remains(void)
{
	savefile_remove(SAVED_TEMP_FILE);
	savefile_remove(SAVED_LOADING_FILE);
}

/*
 * If there is a file that can be used, take it over, so that it is to be
 * read.  Returns whether there is something to read.  A process that
 * only copies it leaves it its name, so that it is still there when that fails.
 */
static bool
take_over(bool to_load)
{
	uint32		state = pg_atomic_read_u32(&shared_control->load.state);
	SavedHeader header;
	const char *reason;

	if (state == STATE_LOADING)
		return true;

	remove_remains();
	if (!savefile_exists(SAVED_FILE))
		return false;
	reason = savefile_check(SAVED_FILE, &header);
	if (reason != NULL)
	{
		savefile_set_aside(SAVED_FILE, reason);
		return false;
	}

	/* known before the name is gone: see load_is_pending() */
	shared_control->load.section = 0;
	shared_control->load.offset = sizeof(SavedHeader);
	if (!to_load)
		return true;
	set_state(STATE_LOADING);
	if (durable_rename(SAVED_FILE, SAVED_LOADING_FILE, LOG) != 0)
	{
		int			save_errno = errno;

		/*
		 * It may have been renamed and not synced.  Then it is to have the
		 * old name again, because nobody reads it under the new one if the
		 * state is as before.
		 */
		if (savefile_exists(SAVED_FILE) ||
			rename(SAVED_LOADING_FILE, SAVED_FILE) == 0)
			set_state(state);
		errno = save_errno;
		ereport(ERROR,
				(errcode_for_file_access(),
				 errmsg("could not rename file \"%s\" to \"%s\": %m",
						SAVED_FILE, SAVED_LOADING_FILE)));
	}
	return true;
}

/*
 * Is there a file that has not, or not wholly, been read?  Called by any
 * process that is attached to SharedControl.
 */
bool
load_is_pending(void)
{
	uint32		state = pg_atomic_read_u32(&shared_control->load.state);

	if (likely(state >= STATE_LOADED))
		return false;
	if (state == STATE_LOADING || savefile_exists(SAVED_FILE))
		return true;
	return !pg_atomic_compare_exchange_u32(&shared_control->load.state,
										   &state, STATE_LOADED) &&
		state < STATE_LOADED;
}

/*
 * Is there something that was not loaded, and is to be copied to the next file?
 * Then returns the name of the file, the offset of the section that was being
 * read, or 0, and the offset from which on nothing was read.
 */
bool
load_find_rest(const char **name, int64 *section, int64 *offset)
{
	/* a file that was never read must not be overwritten */
	if (!take_over(false))
		return false;
	*name = pg_atomic_read_u32(&shared_control->load.state) == STATE_LOADING ?
		SAVED_LOADING_FILE : SAVED_FILE;
	*section = shared_control->load.section;
	*offset = shared_control->load.offset;
	return true;
}

/* Has everything been saved to a new file? */
bool
load_is_saved(void)
{
	return pg_atomic_read_u32(&shared_control->load.state) == STATE_SAVED;
}

/* From here on everything is in a new file, or may be. */
void
load_set_saved(void)
{
	set_state(STATE_SAVED);
}

/* ------------------------------------------------------------------------
 * Reading the file
 * ------------------------------------------------------------------------
 */

/* Add to a key, as if it had just been committed. */
static void
load_key(SharedBuffer *buffer, CounterTable *table,
		 const SavedSection *section, const SavedKey *saved, const char *data,
		 int64 to_timestamp)
{
	ClockTime	counted_at = Max(saved->counted_at - to_timestamp, 1);
	KeyBytes	key = {data, saved->keylen, key_hash(data, saved->keylen)};
	CounterPin	pin;

	if (saved->counted_at == 0)
		counted_at = clock_now() - section->interval;
	counters_pin(buffer, table, &key, saved->count, PG_INT64_MAX, &pin);

	/* before the key, so that the sums never show less than was stored */
	registry_count(buffer, STAT_PUBLISHED, (uint64) saved->count);
	counters_add_loaded(buffer, &pin, saved->count, counted_at);
}

/* A pass through the file. */
typedef struct Loading
{
	FILE	   *file;
	int64		to_timestamp;	/* from our clock to that of the file */
	int64		offset;			/* of the next record */
	bool		in_section;		/* begins in the middle of a section */
	SavedSection section;
	SharedBuffer *buffer;		/* claimed; NULL: none */
	CounterTable table;
} Loading;

/* Cease to work on a buffer. */
static void
leave_buffer(Loading *loading)
{
	table_detach(&loading->table);
	registry_release_all(0);
	loading->buffer = NULL;
}

/*
 * Claim the buffer of a section, or make it.  Returns false if it has a worker:
 * only a process that acts as the worker may work in a table without a lock on
 * the relation.
 */
static bool
enter_buffer(Loading *loading, const SavedSection *section)
{
	BufferSettings settings = {
		.owner = section->owner,
		.interval = section->interval
	};
	KeyShape   *shape = savefile_read_shape(loading->file, section);
	bool		made;

	leave_buffer(loading);
	loading->section = *section;
	(void) registry_make(section->dboid, section->relid, &settings, &made);
	loading->buffer = registry_claim(section->dboid, section->relid);
	if (loading->buffer == NULL)
		return false;
	table_find_shape(&loading->buffer->table, shape, true, &loading->table);
	if (loading->table.shape == TABLE_SHAPES)
		elog(ERROR, "too many shapes of buffer %u", section->relid);
	table_attach(&loading->buffer->table, &loading->table);
	pfree(shape);
	return true;
}

/*
 * Note that everything before `offset' is loaded.  Between the last change of a
 * counter and this, nothing can fail or be interrupted.
 */
static void
set_offset(Loading *loading, int64 offset)
{
	loading->offset = offset;
	shared_control->load.offset = offset;
}

/* Begin to load a section.  Returns false as enter_buffer() does. */
static bool
load_section(Loading *loading, const SavedSection *section)
{
	if (!enter_buffer(loading, section))
		return false;
	if (loading->in_section)
	{
		/* go on where the process before us stopped */
		loading->in_section = false;
		if (fseeko(loading->file, loading->offset, SEEK_SET) != 0)
			elog(ERROR, "could not seek in file \"%s\"", SAVED_LOADING_FILE);
		return true;
	}
	shared_control->load.section = loading->offset;
	set_offset(loading, loading->offset + sizeof(SavedSection) +
			   section->shape_size);
	return true;
}

/*
 * Load what is left of the file.  Stops when a buffer has a worker, and when the
 * server may be stopping.
 */
static LoadProgress
load_records(Loading *loading)
{
	SavedHeader header;
	SavedRecord record;
	int			n = 0;

	savefile_read_header(loading->file, &header);
	loading->to_timestamp = clock_to_timestamp() +
		savefile_set_back_by(&header, GetCurrentTimestamp());
	loading->offset = shared_control->load.offset;
	loading->in_section = shared_control->load.section != 0;
	if (fseeko(loading->file, loading->in_section ?
			   shared_control->load.section : loading->offset, SEEK_SET) != 0)
		elog(ERROR, "could not seek in file \"%s\"", SAVED_LOADING_FILE);

	while (savefile_read_record(loading->file, &record))
	{
		KeySpace	space;

		if (record.kind == RECORD_SECTION)
		{
			if (!load_section(loading, &record.section))
				return LOAD_BLOCKED;
			continue;
		}
		if (loading->buffer == NULL)
			elog(ERROR, "unexpected record in file \"%s\"",
				 SAVED_LOADING_FILE);
		savefile_read_key(loading->file, &record.key, &space);
		load_key(loading->buffer, &loading->table, &loading->section,
				 &record.key, space.data, loading->to_timestamp);
		set_offset(loading, loading->offset + sizeof(SavedKey) +
				   KEY_LENGTH(record.key.keylen));
		if (++n % 1000 == 0)
		{
			CHECK_FOR_INTERRUPTS();
			if (ShutdownRequestPending)
				return LOAD_BLOCKED;
		}
	}

	ereport(LOG,
			(errmsg("statbuffer has loaded the counts that were saved at the last shutdown"),
			 errdetail_plural("They were of %llu key.", "They were of %llu keys.",
							  header.nkeys,
							  (unsigned long long) header.nkeys)));
	return LOAD_FINISHED;
}

/* Load what there is, as far as that goes. */
static LoadProgress
load_all(Loading *loading)
{
	LoadProgress progress;

	if (!take_over(true))
		return LOAD_FINISHED;
	loading->file = savefile_open(SAVED_LOADING_FILE, 0);
	progress = load_records(loading);
	FreeFile(loading->file);
	if (progress == LOAD_FINISHED)
		savefile_remove(SAVED_LOADING_FILE);
	return progress;
}

/* Log an error that loading has met, unless one was logged a while ago. */
static void
log_error(ErrorData *edata)
{
	static ClockTime last_logged = 0;
	ClockTime	now = clock_now();

	if (last_logged != 0 && !clock_passed(last_logged, now, LOG_AGAIN_MSECS))
		return;
	last_logged = now;
	ereport(LOG,
			(errcode(edata->sqlerrcode),
			 errmsg("statbuffer could not load all counts of the last shutdown yet: %s",
					edata->message),
			 edata->detail ?
			 errdetail_internal("%s", edata->detail) : 0,
			 edata->hint ? errhint("%s", edata->hint) : 0));
}

/*
 * Load the counts that the last shutdown has saved.  If not all can be loaded
 * now, call it again: if it is blocked, when a worker has left, or if it has
 * failed, later, as memory may be out.  Errors are logged.
 */
LoadProgress
load_continue(void)
{
	MemoryContext context = CurrentMemoryContext;
	Loading		loading = {0};
	volatile LoadProgress progress = LOAD_FAILED;

	/* a session may have seen that there is no file */
	if (pg_atomic_read_u32(&shared_control->load.state) >= STATE_LOADED)
	{
		remove_remains();
		return LOAD_FINISHED;
	}

	StartTransactionCommand();
	PG_TRY();
	{
		progress = load_all(&loading);
		if (progress == LOAD_FINISHED)
		{
			/* our last claim must not be taken for a worker */
			registry_release_all(0);
			set_state(STATE_LOADED);
		}
		CommitTransactionCommand();
	}
	PG_CATCH();
	{
		ErrorData  *edata;

		MemoryContextSwitchTo(context);
		edata = CopyErrorData();
		FlushErrorState();
		AbortCurrentTransaction();
		LWLockReleaseAll();
		log_error(edata);
		FreeErrorData(edata);
	}
	PG_END_TRY();
	leave_buffer(&loading);
	MemoryContextSwitchTo(context);
	return progress;
}
