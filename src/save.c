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
#include "registry.h"
#include "save.h"
#include "savefile.h"
#include "storage/fd.h"
#include "utils/memutils.h"
#include "utils/ps_status.h"

/* how long to wait for transactions that are about to commit */
#define UNPIN_WAIT_MSECS	10000

/* The state while the counts of one shape of a buffer are written. */
typedef struct Saving
{
	SavedWriter *writer;
	int64		to_timestamp;	/* clock_to_timestamp() at the time of saving */
	SavedSection section;
	const KeyShape *shape;		/* of the section */
	bool		section_written;
	uint64		nkeys;			/* keys visited */
	uint64		all_keys;		/* keys of all buffers */
} Saving;

/* Show in the process title how far we are. */
static void
show_progress(const Saving *saving)
{
	char		title[80];

	snprintf(title, sizeof(title), "saving counts: %llu of %llu keys",
			 (unsigned long long) saving->nkeys,
			 (unsigned long long) saving->all_keys);
	set_ps_display(title);
}

/* Write a key: a CounterVisitor. */
static void
save_key(const CounterInfo *info, void *arg)
{
	Saving	   *saving = arg;
	SavedKey	key = {
		.kind = RECORD_KEY,
		.keylen = info->keylen,
		.count = info->count,
		/* retry a failing key after the restart */
		.counted_at = info->failures > 0 || info->counted_at == 0 ? 0 :
		info->counted_at + saving->to_timestamp
	};

	Assert(info->in_flight == 0);
	if (++saving->nkeys % SAVED_PROGRESS_KEYS == 0)
		show_progress(saving);
	if (info->count == 0)
		return;
	if (!saving->section_written)
	{
		savefile_put_section(saving->writer, &saving->section, saving->shape);
		saving->section_written = true;
	}
	savefile_put_key(saving->writer, &key, info->key);
}

static void
save_buffer(Saving *saving, SharedBufferKey key)
{
	SharedBuffer *buffer = registry_claim(key.dboid, key.relid);
	CounterTable table = {.partitions = NULL};

	if (buffer == NULL)
		return;
	table_attach(&buffer->table, &table);
	if (!counters_wait_unpinned(buffer, &table,
								clock_add(clock_now(), UNPIN_WAIT_MSECS)))
		ereport(WARNING,
				(errmsg("a transaction that is about to commit keeps statbuffer from saving counts"),
				 errdetail("What it has counted is lost if it commits.")));
	for (int shape = 0; shape < TABLE_SHAPES; shape++)
	{
		/* only the process that has claimed the buffer could remove it */
		saving->shape = dsa_get_address(shared_area, buffer->table.shapes[shape]);
		if (saving->shape == NULL)
			continue;
		saving->section.kind = RECORD_SECTION;
		saving->section.dboid = key.dboid;
		saving->section.relid = key.relid;
		saving->section.owner = pg_atomic_read_u32(&buffer->settings.owner);
		saving->section.shape_size = saving->shape->size;
		saving->section.interval = registry_interval(buffer);
		saving->section_written = false;
		table.readable = (uint32) 1 << shape;
		table_visit(&buffer->table, &table, save_key, saving);
	}
	table_detach(&table);
	registry_release(buffer, 0);
}

/* Copy a section and its shape, which is still to be read from the file. */
static void
copy_section(SavedWriter *writer, FILE *file, const SavedSection *section)
{
	KeyShape   *shape = savefile_read_shape(file, section);

	savefile_put_section(writer, section, shape);
	pfree(shape);
}

/* Copy the rest of a file that was not loaded completely. */
static void
copy_rest(SavedWriter *writer, const char *name, int64 section, int64 offset)
{
	SavedHeader header;
	SavedRecord record;
	FILE	   *file;

	file = savefile_open(name, 0);
	savefile_read_header(file, &header);
	FreeFile(file);
	if (section != 0)
	{
		file = savefile_open(name, section);
		(void) savefile_read_record(file, &record);
		copy_section(writer, file, &record.section);
		FreeFile(file);
	}
	file = savefile_open(name, offset);
	while (savefile_read_record(file, &record))
	{
		KeySpace	space;

		if (record.kind == RECORD_SECTION)
		{
			copy_section(writer, file, &record.section);
			continue;
		}
		savefile_read_key(file, &record.key, &space);
		if (record.key.counted_at != 0)
			record.key.counted_at -= savefile_set_back_by(&header,
														  writer->header.saved_at);
		savefile_put_key(writer, &record.key, space.data);
	}
	FreeFile(file);
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

		/* its removal was interrupted, and what it held was reported as lost */
		if (registry_is_dropped(buffer))
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
	const char *rest_name;
	int64		rest_section;
	int64		rest_offset;
	bool		rest;

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
	rest = load_find_rest(&rest_name, &rest_section, &rest_offset);
	save_buffers(&saving);
	if (rest)
		copy_rest(writer, rest_name, rest_section, rest_offset);

	if (writer->file != NULL)
	{
		savefile_finish(writer);

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
	if (rest)
		savefile_remove(SAVED_LOADING_FILE);
	error_context_stack = callback.previous;

	if (writer->file != NULL)
		ereport(LOG,
				(errmsg("statbuffer has saved counts that are not yet stored"),
				 errdetail_plural("They are of %llu key.", "They are of %llu keys.",
								  writer->header.nkeys,
								  (unsigned long long) writer->header.nkeys)));
}
