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
 * Who looks for a key while the file is being read does not wait until all is
 * in memory, only until everything is that the file has of the key: see
 * load_is_pending_for().
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
	shared_control->load.nkeys = 0;
	pg_atomic_write_u64(&shared_control->load.reached, 0);
	pg_atomic_write_u64(&shared_control->load.offset, sizeof(SavedHeader));
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
 * Read where the file that is being loaded has the sections of all buffers, and
 * keep that until it is loaded.  Returns NULL if that cannot be read now.
 */
static const SavedRange *
get_ranges(int *nranges)
{
	static SavedRange *ranges = NULL;
	static int	n = 0;
	MemoryContext oldcontext;

	/* there is one such file at most in the life of a process */
	if (ranges == NULL)
	{
		oldcontext = MemoryContextSwitchTo(TopMemoryContext);
		ranges = savefile_read_ranges(SAVED_LOADING_FILE, &n);
		MemoryContextSwitchTo(oldcontext);
	}
	*nranges = n;
	return ranges;
}

/*
 * Is there anything in the file that has not been loaded yet, of the key of a
 * buffer that is at a position (PG_UINT64_MAX: of any)?  If that cannot be
 * determined, returns true.  Takes no lock, but may have to read the file.
 */
bool
load_is_pending_for(Oid dboid, Oid relid, uint64 position)
{
	SharedLoad *load = &shared_control->load;
	const SavedRange *ranges;
	uint64		offset;
	uint64		reached;
	int			n;

	if (!load_is_pending())
		return false;
	if (pg_atomic_read_u32(&load->state) != STATE_LOADING ||
		(ranges = get_ranges(&n)) == NULL)
		return true;

	offset = pg_atomic_read_u64(&load->offset);
	pg_read_barrier();
	reached = pg_atomic_read_u64(&load->reached);
	for (int i = 0; i < n; i++)
	{
		const SavedRange *range = &ranges[i];

		if (range->dboid != dboid || range->relid != relid ||
			offset >= range->end)
			continue;
		if (offset <= range->begin || position >= reached)
			return true;
	}
	return false;
}

/*
 * Is there anything that was not loaded, and must be copied to the next file?
 * If so, returns where it is.
 */
bool
load_find_rest(LoadRest *rest)
{
	SharedLoad *load = &shared_control->load;

	/* a file that was never read must not be overwritten */
	if (!take_over(false))
		return false;
	rest->name = pg_atomic_read_u32(&load->state) == STATE_LOADING ?
		SAVED_LOADING_FILE : SAVED_FILE;
	rest->section = load->section;
	rest->offset = (int64) pg_atomic_read_u64(&load->offset);
	rest->nkeys = load->nkeys;
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

/* how many counters to make under one lock of the table, at most */
#define RUN_KEYS		HASH_MANY

/* how many keys to load one by one where the first of a run is there */
#define SINGLE_KEYS		32

/* Reading the file, by this process. */
typedef struct Loading
{
	SavedReader *reader;
	int64		to_timestamp;	/* from a ClockTime to the file's clock */
	SavedSection section;
	SharedBuffer *buffer;		/* claimed; NULL: none */
	CounterTable table;
	uint64		reserved_up_to; /* position up to which buckets are reserved */
	uint64		nkeys;			/* keys loaded */
	uint64		shown_nkeys;	/* and when that was last shown */
	int			run;			/* how many to create at a time */
	LoadedCount new[RUN_KEYS];
	HashItem	items[RUN_KEYS];	/* of some of them */
} Loading;

static inline int64
get_offset(void)
{
	return (int64) pg_atomic_read_u64(&shared_control->load.offset);
}

/*
 * Note that keys of the present block are loaded.  Nothing may fail or be
 * interrupted between the last change of a counter and this.
 */
static inline void
note_loaded(Loading *loading, int nkeys)
{
	shared_control->load.nkeys += nkeys;
	loading->nkeys += nkeys;
}

/* Go to the next record, in the same section. */
static void
go_to(int64 offset, uint64 reached)
{
	SharedLoad *load = &shared_control->load;

	load->nkeys = 0;
	pg_atomic_write_u64(&load->reached, reached);
	pg_write_barrier();
	pg_atomic_write_u64(&load->offset, (uint64) offset);
}

/* The time when a saved count was counted. */
static inline ClockTime
get_counted_at(const Loading *loading, const SavedKey *saved)
{
	if (saved->counted_at == 0)
		return clock_now() - loading->section.interval;
	return Max(saved->counted_at - loading->to_timestamp, 1);
}

/* Add a saved count to its key, as if it had just been committed. */
static void
load_key(Loading *loading, const LoadedCount *new)
{
	SharedBuffer *buffer = loading->buffer;
	CounterPin	pin;

	counters_pin_held(buffer, &loading->table, &new->key, new->count, &pin);

	/* before the key, so that the sums never show less than was stored */
	registry_count(buffer, STAT_PUBLISHED, (uint64) new->count);
	counters_add_loaded(buffer, &pin, new->count, new->counted_at);
	note_loaded(loading, 1);
}

/*
 * Load keys.  Most are new, and are created many at a time.  Others have been
 * counted meanwhile, and are loaded one by one; they are often not alone.
 */
static void
load_run(Loading *loading, const LoadedCount *new, int n)
{
	while (n > 0)
	{
		int			nrun = Min(n, loading->run);
		int			nallocated;
		int			ncreated;
		int			nsingle;

		ncreated = counters_create_loaded(loading->buffer, &loading->table,
										  new, nrun, loading->items,
										  &nallocated);
		note_loaded(loading, ncreated);
		table_free_many(&loading->items[ncreated], nallocated - ncreated);
		new += ncreated;
		n -= ncreated;
		if (ncreated == nrun)
		{
			loading->run = Min(2 * loading->run, RUN_KEYS);
			continue;
		}
		loading->run = Max(2 * ncreated, 1);
		nsingle = Min(n, ncreated > 0 ? 1 : SINGLE_KEYS);
		for (int i = 0; i < nsingle; i++)
			load_key(loading, new++);
		n -= nsingle;
	}
}

/* Detach from the buffer, and release it. */
static void
leave_buffer(Loading *loading)
{
	table_detach(&loading->table);
	registry_release_all(0);
	loading->buffer = NULL;
}

/*
 * Claim the buffer of the section at an offset, and create it if necessary: only
 * a process that acts as the worker may access a table without a lock on the
 * relation.  Returns false if the buffer has a worker, is being removed, or was
 * removed at the same moment.
 */
static bool
enter_buffer(Loading *loading, int64 offset, const SavedSection *section)
{
	BufferSettings settings = {
		.owner = section->owner,
		.interval = section->interval
	};
	KeyShape   *shape = savefile_read_shape(loading->reader, offset, section);
	bool		made;

	leave_buffer(loading);
	loading->section = *section;
	loading->reserved_up_to = 0;
	(void) registry_make(section->dboid, section->relid, &settings, &made);
	loading->buffer = registry_claim(section->dboid, section->relid);
	if (loading->buffer != NULL && registry_is_dropped(loading->buffer))
		leave_buffer(loading);
	if (loading->buffer == NULL)
		return false;
	table_find_shape(&loading->buffer->table, shape, true, false,
					 &loading->table);
	if (loading->table.shape == TABLE_SHAPES)
		elog(ERROR, "too many shapes of buffer %u", section->relid);
	table_attach(&loading->buffer->table, &loading->table);
	pfree(shape);
	return true;
}

/*
 * Show in the process title how far we are.  It stays there until everything is
 * loaded, also if that is interrupted.
 */
static void
show_progress(Loading *loading)
{
	char		title[64];

	snprintf(title, sizeof(title), "loading saved counts: %d %%",
			 (int) (get_offset() * 100 / loading->reader->end));
	set_ps_display(title);
	loading->shown_nkeys = loading->nkeys;
}

/* Begin to load the section at the present offset. */
static bool
load_section(Loading *loading, const SavedRecord *record)
{
	int64		offset = get_offset();

	if (!enter_buffer(loading, offset, &record->section))
		return false;
	go_to(offset, 0);
	shared_control->load.section = offset;
	go_to(savefile_next(offset, record), 0);
	ConditionVariableBroadcast(&shared_control->load.cv);
	return true;
}

/*
 * At the first block of a partition: reserve buckets for the keys of all of its
 * blocks.
 */
static void
reserve(Loading *loading, int64 offset, const SavedBlock *block,
		const KeyBytes *key)
{
	SavedRecord record = {.block = *block};
	uint32		nkeys = 0;

	if (block->begin < loading->reserved_up_to)
		return;
	do
	{
		nkeys += record.block.nkeys;
		loading->reserved_up_to = record.block.end;
		offset = savefile_next(offset, &record);
	} while (savefile_read_record(loading->reader, offset, &record) &&
			 record.kind == RECORD_BLOCK &&
			 record.block.begin >> 32 == block->begin >> 32);
	table_reserve(&loading->table, key, nkeys);
}

/* Load the rest of the block at the present offset. */
static void
load_block(Loading *loading, const SavedRecord *record)
{
	SharedLoad *load = &shared_control->load;
	const SavedBlock *block = &record->block;
	int64		offset = get_offset();
	int64		next;
	SavedRecord following;
	SavedKey	key;

	savefile_read_block(loading->reader, offset, block);
	for (uint32 i = 0; i < load->nkeys; i++)
		savefile_next_key(loading->reader, &key);
	while (load->nkeys < block->nkeys)
	{
		int			n = Min(block->nkeys - load->nkeys, RUN_KEYS);

		for (int i = 0; i < n; i++)
		{
			LoadedCount *new = &loading->new[i];

			savefile_next_key(loading->reader, &key);
			new->key.data = key.data;
			new->key.len = key.len;
			new->key.hash = key_hash(key.data, key.len);
			new->count = key.count;
			new->counted_at = get_counted_at(loading, &key);
		}
		reserve(loading, offset, block, &loading->new[0].key);
		load_run(loading, loading->new, n);
	}
	next = savefile_next(offset, record);

	/*
	 * Release the claim on a buffer that is loaded before others can see that
	 * it is: it must not be taken for a worker.
	 */
	if (!savefile_read_record(loading->reader, next, &following) ||
		following.kind != RECORD_BLOCK)
		leave_buffer(loading);
	go_to(next, block->end);
	if (block->begin >> 32 != block->end >> 32)
		ConditionVariableBroadcast(&load->cv);
}

/* Continue with the section that another process was reading, if there is one. */
static bool
resume_section(Loading *loading)
{
	SavedRecord record;
	int64		offset = shared_control->load.section;

	if (offset == 0)
		return true;
	if (!savefile_read_record(loading->reader, offset, &record) ||
		record.kind != RECORD_SECTION)
		elog(ERROR, "unexpected record in file \"%s\"", SAVED_LOADING_FILE);
	return enter_buffer(loading, offset, &record.section);
}

/*
 * Load the rest of the file.  Stops if a buffer has a worker, and if the
 * server may be stopping.
 */
static LoadProgress
load_records(Loading *loading)
{
	const SavedHeader *header = &loading->reader->header;
	SavedRecord record;

	loading->to_timestamp = clock_to_timestamp() +
		savefile_set_back_by(header, GetCurrentTimestamp());

	loading->run = RUN_KEYS;
	show_progress(loading);
	if (!resume_section(loading))
		return LOAD_BLOCKED;
	while (savefile_read_record(loading->reader, get_offset(), &record))
	{
		if (record.kind == RECORD_SECTION)
		{
			if (!load_section(loading, &record))
				return LOAD_BLOCKED;
		}
		else if (loading->buffer == NULL)
			elog(ERROR, "unexpected record in file \"%s\"",
				 SAVED_LOADING_FILE);
		else
			load_block(loading, &record);
		if (loading->nkeys - loading->shown_nkeys >= SAVED_PROGRESS_KEYS)
			show_progress(loading);
		CHECK_FOR_INTERRUPTS();
		if (ShutdownRequestPending)
			return LOAD_BLOCKED;
	}

	ereport(LOG,
			(errmsg("statbuffer has loaded the counts that were saved at the last shutdown"),
			 errdetail_plural("They were of %llu key.", "They were of %llu keys.",
							  header->nkeys,
							  (unsigned long long) header->nkeys)));
	return LOAD_FINISHED;
}

/* Load as much as possible. */
static LoadProgress
load_all(Loading *loading)
{
	LoadProgress progress;

	if (!take_over(true))
		return LOAD_FINISHED;
	loading->reader = savefile_open(SAVED_LOADING_FILE);
	progress = load_records(loading);
	savefile_close(loading->reader);
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
