/*-------------------------------------------------------------------------
 *
 * save.c
 *	  Saving the counts that a clean shutdown could not store.
 *
 * Called by the launcher, or the process that acts as the launcher, when the
 * registry is closed and no process is left that could count or flush.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "counters.h"
#include "load.h"
#include "port/pg_bitutils.h"
#include "registry.h"
#include "save.h"
#include "savefile.h"
#include "settings.h"
#include "storage/fd.h"
#include "utils/memutils.h"
#include "utils/ps_status.h"

/* how long to wait for transactions that are about to commit */
#define UNPIN_WAIT_MSECS	10000

#define NO_SHAPE			TABLE_SHAPES

/* The state while counts are written, and while those of a buffer are. */
typedef struct Saving
{
	SavedWriter *writer;
	int64		to_timestamp;	/* clock_to_timestamp() at the time of saving */
	uint64		nkeys;			/* keys visited, of those that are held */
	uint64		shown_nkeys;	/* and when that was last shown */
	uint64		all_keys;		/* keys of all buffers */

	SharedBuffer *buffer;		/* claimed */
	int			shape;			/* of the keys that are written, or NO_SHAPE */
	bool		in_section;
	uint32		other_shapes;	/* of keys that the scan has passed over */
	uint64		position;		/* of the scan, before the present portion */
	List	   *pinned;			/* counters of the portion that are pinned */
	ClockTime	wait_until;		/* for pinned counters */
	bool		warned;			/* that there were some for too long */
} Saving;

/* Show in the process title how far we are. */
static void
show_progress(Saving *saving)
{
	char		title[80];

	snprintf(title, sizeof(title), "saving counts: %llu of %llu keys",
			 (unsigned long long) saving->nkeys,
			 (unsigned long long) saving->all_keys);
	set_ps_display(title);
	saving->shown_nkeys = saving->nkeys;
}

/* Begin a section for the keys of a shape. */
static void
put_section(Saving *saving, int shape)
{
	SharedBuffer *buffer = saving->buffer;

	/* only the process that has claimed the buffer could remove it */
	KeyShape   *key_shape = dsa_get_address(shared_area,
											buffer->table.shapes[shape]);
	SavedSection section = {
		.kind = RECORD_SECTION,
		.dboid = buffer->key.dboid,
		.relid = buffer->key.relid,
		.owner = pg_atomic_read_u32(&buffer->settings.owner),
		.shape_size = key_shape->size,
		.interval = registry_interval(buffer)
	};

	savefile_put_section(saving->writer, &section, key_shape, saving->position);
	saving->shape = shape;
	saving->in_section = true;
}

/* Put a counter that was found not to be pinned, so that its count is final. */
static void
put_counter(Saving *saving, SharedCounter *counter)
{
	ClockTime	counted_at;
	SavedKey	key = {
		.len = counter->keylen,
		.data = counter->key
	};

	/* read the count after the pins: see SharedClaims */
	pg_read_barrier();
	Assert(pg_atomic_read_u64(&counter->in_flight) == 0);
	key.count = (int64) pg_atomic_read_u64(&counter->count);
	if (key.count == 0)
		return;

	/* retry a failing key after the restart */
	counted_at = (ClockTime) pg_atomic_read_u64(&counter->counted_at);
	if (counter->failures == 0 && counted_at != 0)
		key.counted_at = counted_at + saving->to_timestamp;
	if (!saving->in_section)
		put_section(saving, counter->shape);
	savefile_put_key(saving->writer, &key);
}

/* Put the counters of a portion, except for those that are pinned. */
static void
put_portion(Saving *saving, TableScan *scan)
{
	SharedCounter *counter;

	while ((counter = table_next(scan).counter) != NULL)
	{
		if (saving->shape != NO_SHAPE && counter->shape != saving->shape)
		{
			saving->other_shapes |= (uint32) 1 << counter->shape;
			continue;
		}
		saving->nkeys++;
		if (counter_has_flag(counter, COUNTER_PINS))
		{
			saving->pinned = lappend(saving->pinned, counter);
			continue;
		}
		put_counter(saving, counter);
	}
}

/*
 * Put the counters of the portion that were pinned, when they no longer are.
 * Only the worker could free them, and that is us.
 */
static void
put_pinned(Saving *saving)
{
	ListCell   *lc;

	if (likely(saving->pinned == NIL))
		return;
	if (saving->wait_until == 0)
		saving->wait_until = clock_add(clock_now(), UNPIN_WAIT_MSECS);
	foreach(lc, saving->pinned)
	{
		SharedCounter *counter = lfirst(lc);

		if (!counters_wait_unpinned(saving->buffer, counter,
									saving->wait_until) &&
			!saving->warned)
		{
			ereport(WARNING,
					(errmsg("a transaction that is about to commit keeps statbuffer from saving counts"),
					 errdetail("What it has counted is lost if it commits.")));
			saving->warned = true;
		}
		if (saving->shape != NO_SHAPE && counter->shape != saving->shape)
			saving->other_shapes |= (uint32) 1 << counter->shape;
		else
			put_counter(saving, counter);
	}
	list_free(saving->pinned);
	saving->pinned = NIL;
}

/*
 * Put the keys of one shape, or if that is NO_SHAPE, of the shape of the first
 * key with a count.
 */
static void
save_shape(Saving *saving, const CounterTable *table, int shape)
{
	TableScan	scan;

	saving->shape = shape;
	saving->in_section = false;
	saving->position = 0;
	table_begin_scan(&scan, table, false);
	while (table_begin_portion(&scan))
	{
		put_portion(saving, &scan);
		put_pinned(saving);
		saving->position = table_scan_position(&scan);
		savefile_end_portion(saving->writer, saving->position);
		if (saving->nkeys - saving->shown_nkeys >= SAVED_PROGRESS_KEYS)
			show_progress(saving);
	}
}

static void
save_buffer(Saving *saving, SharedBufferKey key)
{
	SharedBuffer *buffer = registry_claim(key.dboid, key.relid);
	CounterTable table = {.partitions = NULL};

	if (buffer == NULL)
		return;
	table_attach(&buffer->table, &table);
	requests_drop_flushes(&buffer->requests);
	saving->buffer = buffer;
	saving->other_shapes = 0;
	saving->wait_until = 0;
	saving->warned = false;

	/* most often, all keys have the same shape */
	save_shape(saving, &table, NO_SHAPE);
	for (uint32 others = saving->other_shapes; others != 0;
		 others &= others - 1)
		save_shape(saving, &table, pg_rightmost_one_pos32(others));
	table_detach(&table);
	registry_release(buffer, 0);
}

/* Copy the keys of a block, without the first ones. */
static void
copy_block(SavedWriter *writer, SavedReader *reader, int64 offset,
		   const SavedBlock *block, uint32 nskip)
{
	int64		set_back_by = savefile_set_back_by(&reader->header,
												   writer->header.saved_at);
	SavedKey	key;

	savefile_read_block(reader, offset, block);
	savefile_end_portion(writer, block->begin);
	for (uint32 i = 0; i < block->nkeys; i++)
	{
		savefile_next_key(reader, &key);
		if (i < nskip)
			continue;
		if (key.counted_at != 0)
			key.counted_at -= set_back_by;
		savefile_put_key(writer, &key);
	}
	savefile_end_portion(writer, block->end);
}

/* Copy a section and its shape. */
static void
copy_section(SavedWriter *writer, SavedReader *reader, int64 offset,
			 const SavedSection *section)
{
	KeyShape   *shape = savefile_read_shape(reader, offset, section);

	savefile_put_section(writer, section, shape, 0);
	pfree(shape);
}

/* Copy the rest of a file that was not loaded completely. */
static void
copy_rest(SavedWriter *writer, const LoadRest *rest)
{
	SavedReader *reader = savefile_open(rest->name);
	int64		offset = rest->offset;
	uint32		nskip = rest->nkeys;
	SavedRecord record;

	if (rest->section != 0)
	{
		(void) savefile_read_record(reader, rest->section, &record);
		copy_section(writer, reader, rest->section, &record.section);
	}
	for (; savefile_read_record(reader, offset, &record);
		 offset = savefile_next(offset, &record))
	{
		if (record.kind == RECORD_SECTION)
			copy_section(writer, reader, offset, &record.section);
		else
			copy_block(writer, reader, offset, &record.block, nskip);
		nskip = 0;
	}
	savefile_close(reader);
}

/*
 * Ensure that all commits are on disk, including asynchronous ones: a
 * synchronous commit flushes them, too.  As ours changes nothing, it waits for
 * no standby.
 */
static void
sync_commits(void)
{
	StartTransactionCommand();
	(void) GetCurrentTransactionId();
	ForceSyncCommit();
	CommitTransactionCommand();
}

static void
saving_context(void *arg)
{
	errcontext("while saving counts that are not yet stored; they are lost if this fails");
}

/*
 * Write the counts of all buffers.  First lists the buffers, then claims each.
 */
static void
save_buffers(Saving *saving)
{
	List	   *keys = NIL;
	ListCell   *lc;
	RegistryScan scan;
	SharedBuffer *buffer;

	registry_begin_scan(&scan);
	while ((buffer = registry_next(&scan)) != NULL)
	{
		SharedBufferKey *key;

		/*
		 * The removal of one was interrupted, and what it held was reported
		 * as lost.  The ledger has the counts of another.
		 */
		if (registry_is_dropped(buffer) || registry_is_durable(buffer))
			continue;
		key = palloc(sizeof(SharedBufferKey));
		*key = buffer->key;
		keys = lappend(keys, key);
		saving->all_keys += table_nkeys(&buffer->table);
	}
	registry_end_scan(&scan);
	show_progress(saving);
	foreach(lc, keys)
		save_buffer(saving, *(SharedBufferKey *) lfirst(lc));
}

/*
 * Save the counts of all buffers, and the rest of the last file.  Writes no
 * file if there is nothing, or if it has been done.  The caller has closed the
 * registry, and exits afterwards.  Raises an error if that fails; then the
 * counts are lost.
 */
void
save_all(void)
{
	ErrorContextCallback callback = {
		.previous = error_context_stack,
		.callback = saving_context
	};
	Saving		saving = {0};
	SavedWriter *writer;
	LoadRest	rest;
	bool		has_rest;
	bool		saved;

	Assert(registry_is_closed());
	if (load_is_saved())
		return;

	MemoryContextSwitchTo(AllocSetContextCreate(TopMemoryContext,
												"statbuffer saving",
												ALLOCSET_DEFAULT_SIZES));
	error_context_stack = &callback;

	writer = savefile_begin(GetCurrentTimestamp());
	saving.writer = writer;
	saving.to_timestamp = writer->header.saved_at - clock_now();
	has_rest = load_find_rest(&rest);
	save_buffers(&saving);
	if (has_rest)
		copy_rest(writer, &rest);

	saved = savefile_finish(writer);
	if (saved)
	{
		/*
		 * The server may still crash before its shutdown checkpoint.  Even
		 * then, the counts in the file must have been committed, and those
		 * not in the file must have been stored.
		 */
		sync_commits();

		/*
		 * Another launcher may have been starting when this one was
		 * terminated, and come up only now.  It must not add the same counts
		 * to the file, even if the rename fails after the file has got its
		 * name.
		 */
		load_set_saved();
		(void) durable_rename(SAVED_TEMP_FILE, SAVED_FILE, ERROR);
	}
	if (has_rest)
		savefile_remove(SAVED_LOADING_FILE);
	error_context_stack = callback.previous;

	if (saved)
		ereport(LOG,
				(errmsg("statbuffer has saved counts that are not yet stored"),
				 errdetail_plural("They are of %llu key.", "They are of %llu keys.",
								  writer->header.nkeys,
								  (unsigned long long) writer->header.nkeys),
				 statbuffer_preloaded ? 0 :
				 errhint("As the library is not preloaded, they stay in the file \"%s\" until a session uses a buffer or looks at sb_stat_buffers after the next start.",
						 SAVED_FILE)));
}
