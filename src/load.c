/*-------------------------------------------------------------------------
 *
 * load.c
 *	  Loading the counts that were saved at the last shutdown.
 *
 * At any time, each count is either in the file or in memory.  The file is
 * checked as a whole.  If it is valid, it is renamed before anything in it is
 * counted: under the new name it is not read after a crash, when some of it may
 * have been flushed already.  (A crash loses counts that are not yet stored.)
 * The position up to which it was read is in shared memory, so that another
 * launcher can continue, and so that the rest is copied to the next file if the
 * server stops.  An invalid file is set aside under another name, and counting
 * begins without it.
 *
 * The states, in SharedLoad.state:
 *
 *		unknown		no process has checked whether there is a file
 *		loading		the file has been renamed, and is being read
 *		loaded		everything that was in it is in memory
 *		saved		everything that is in memory has been saved to a new file
 *
 * The state goes from unknown to loading or, if there is no file, to loaded;
 * any process may do the latter.  All other changes are made by the launcher,
 * or by the process that acts as the launcher.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <sys/stat.h>
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
#include "utils/ps_status.h"

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

/* Remove files that only a crash leaves behind. */
static void
remove_remains(void)
{
	savefile_remove(SAVED_TEMP_FILE);
	savefile_remove(SAVED_LOADING_FILE);
}

/*
 * If there is a valid file, take it over, so that it will be read.  Returns
 * whether there is anything to read.  A process that only copies it (`to_load'
 * is false) does not rename it, so that it is still there if that fails.
 * Raises an error if it cannot be renamed.
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

	/* set the state before the file is renamed: see load_is_pending() */
	shared_control->load.section = 0;
	shared_control->load.offset = sizeof(SavedHeader);
	if (!to_load)
		return true;
	set_state(STATE_LOADING);
	if (durable_rename(SAVED_FILE, SAVED_LOADING_FILE, LOG) != 0)
	{
		int			save_errno = errno;

		/*
		 * It may have been renamed but not synced.  Then rename it back,
		 * because with the previous state it is not read under the new name.
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
 * Is there a file that has not been read completely?  Can be called by any
 * process that is attached to SharedControl.  Takes no lock, but may have to
 * look for the file.
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
 * Is there anything that was not loaded, and must be copied to the next file?
 * If so, returns the name of the file, the offset of the section that was
 * being read, or 0, and the offset of the first record that was not loaded.
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

/* Has everything been saved to a new file?  For the launcher. */
bool
load_is_saved(void)
{
	return pg_atomic_read_u32(&shared_control->load.state) == STATE_SAVED;
}

/* Note that everything is in a new file, or may be. */
void
load_set_saved(void)
{
	set_state(STATE_SAVED);
}

/* ------------------------------------------------------------------------
 * Reading the file
 * ------------------------------------------------------------------------
 */

/* Add a saved count to its key, as if it had just been committed. */
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
	counters_pin_loaded(buffer, table, &key, saved->count, &pin);

	/* before the key, so that the sums never show less than was stored */
	registry_count(buffer, STAT_PUBLISHED, (uint64) saved->count);
	counters_add_loaded(buffer, &pin, saved->count, counted_at);
}

/* A scan of the file. */
typedef struct Loading
{
	FILE	   *file;
	int64		to_timestamp;	/* from a ClockTime to the file's clock */
	int64		offset;			/* of the next record */
	bool		in_section;		/* starts in the middle of a section */
	SavedSection section;
	SharedBuffer *buffer;		/* claimed; NULL: none */
	CounterTable table;
} Loading;

/* Detach from the buffer, and release it. */
static void
leave_buffer(Loading *loading)
{
	table_detach(&loading->table);
	registry_release_all(0);
	loading->buffer = NULL;
}

/*
 * Claim the buffer of a section, and create it if necessary: only a process
 * that acts as the worker may access a table without a lock on the relation.
 * Returns false if the buffer has a worker, is being removed, or was removed at
 * the same moment.
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
	if (loading->buffer != NULL && registry_is_dropped(loading->buffer))
		leave_buffer(loading);
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
 * Note that everything before `offset' is loaded.  Nothing may fail or be
 * interrupted between the last change of a counter and this.
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
		/* continue where the previous process stopped */
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
 * Show in the process title how far we are.  It stays there until everything is
 * loaded, also if that is interrupted.
 */
static void
show_progress(Loading *loading)
{
	struct stat file;
	char		title[64];

	if (fstat(fileno(loading->file), &file) != 0 || file.st_size == 0)
		return;
	snprintf(title, sizeof(title), "loading saved counts: %d %%",
			 (int) (loading->offset * 100 / file.st_size));
	set_ps_display(title);
}

/*
 * Load the rest of the file.  Stops if a buffer has a worker, and if the
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

	show_progress(loading);
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
		if (++n % SAVED_PROGRESS_KEYS == 0)
			show_progress(loading);
		if (n % 1000 == 0)
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

/* Load as much as possible. */
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

/*
 * Log an error that occurred during loading, unless one was logged within
 * LOG_AGAIN_MSECS.
 */
static void
log_error(ErrorData *edata)
{
	static ClockTime last_logged = 0;

	if (!clock_limit(&last_logged, clock_now(), LOG_AGAIN_MSECS))
		return;
	ereport(LOG,
			(errcode(edata->sqlerrcode),
			 errmsg("statbuffer could not load all counts of the last shutdown yet: %s",
					edata->message),
			 edata->detail ?
			 errdetail_internal("%s", edata->detail) : 0,
			 edata->hint ? errhint("%s", edata->hint) : 0));
}

/*
 * Load the counts that were saved at the last shutdown.  If not everything can
 * be loaded now, call this again: if it is blocked, when a worker has left; if
 * it has failed, after a while, as memory may be out.
 *
 * For the launcher, outside of a transaction.  Errors are logged, not raised.
 */
LoadProgress
load_continue(void)
{
	MemoryContext context = CurrentMemoryContext;
	Loading		loading = {0};
	volatile LoadProgress progress = LOAD_FAILED;

	/* a session may have found that there is no file */
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
			/* release our last claim, which must not be taken for a worker */
			registry_release_all(0);
			set_state(STATE_LOADED);
			set_ps_display("");
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
