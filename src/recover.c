/*-------------------------------------------------------------------------
 *
 * recover.c
 *	  Bringing counts that only the ledger has into memory.
 *
 * Four tasks are similar, and are here together: loading what the ledger has of
 * other incarnations, sweeping what was prepared, doing both for one buffer that
 * ceases to be durable, and rotating the ledger.  Each adds up rows by epoch and
 * key (EpochSums), in local memory.  Then it pins the counter of each key that has
 * a sum, or appends the sums, or both, in the same transaction.  Counts are added
 * in the COMMIT callback, where nothing can fail and nobody can stop it; ABORT
 * releases the pins.
 *
 * doc/internals.md has the protocol: who locks what, and why each count is
 * in memory once.  What this room must take care of:
 *
 * - The buffers are locked in RowExclusiveLock before the epochs are read, so
 *	 that no epoch that is found is deleted before the commit.
 * - Buffers are locked without waiting.  Whoever keeps others out of a buffer may
 *	 wait for the keeper.
 * - Rows are only deleted if a snapshot that is older than the epochs has seen
 *	 them: a row whose epoch is missing is nobody's, and not one that is newer.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/heapam.h"
#include "access/relation.h"
#include "access/table.h"
#include "access/xact.h"
#include "buffer.h"
#include "compat.h"
#include "counters.h"
#include "ddl.h"
#include "launch.h"
#include "ledger.h"
#include "miscadmin.h"
#include "recover.h"
#include "storage/bufmgr.h"
#include "storage/lmgr.h"
#include "sums.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

/* how many buffers to recover, and so to lock, in one transaction at most */
#define MANY_BUFFERS		500

/* A buffer whose counts are recovered, and which is locked. */
typedef struct RecoverBuffer
{
	Oid			relid;
	bool		gone;			/* it is not there: its epochs are nobody's */
	BufferSettings settings;
	SharedBuffer *shared;		/* NULL: there is none, or it was not looked
								 * for */
	uint64		sum;			/* of the counts that are pinned */
} RecoverBuffer;

/* An epoch whose rows are read. */
typedef struct RecoverEpoch
{
	uint64		number;
	Oid			relid;
	RecoverBuffer *buffer;		/* NULL: it is not locked */
	KeyShape   *shape;
	CounterTable table;
	uint64		nsums;			/* keys with a sum; then where they are listed */
	uint64		incarnation;	/* to append the sums in */

	/* of rows of other incarnations, if they are added up by themselves */
	struct RecoverEpoch *others;
} RecoverEpoch;

/* Rows that are added up. */
typedef struct EpochSums
{
	MemoryContext context;		/* of all that is here */
	KeySums		keys;			/* those of epochs */
	RecoverEpoch *epochs;		/* by number */
	int			nepochs;
	RecoverEpoch *recent;		/* the epoch of the last row, or NULL */
	uint64		incarnation;	/* the present one */
	bool		others;			/* pass over rows of the present one */
	bool		every;			/* also of buffers that are not locked */

	/* rows of sb_ledger_prepared, to be deleted */
	ItemPointerData *tids;
	uint64		ntids;
	uint64		tids_size;
	bool		sweeps;			/* also rows that are nobody's */
	bool		blocked;		/* a row was left, because its buffer is not
								 * locked */
	uint32		nleft;			/* rows that were left */

	LedgerWriter *writer;		/* for rows that are damaged, or NULL */
} EpochSums;

/* A count that is to be added. */
typedef struct Addition
{
	SharedBuffer *shared;
	CounterPin	pin;
	int64		count;
} Addition;

/*
 * What the transaction does when it commits.  In TopTransactionContext.  It is
 * right at each moment, so that an error leaves no pin.
 */
typedef struct Recovery
{
	struct Recovery *next;		/* the transaction's, one for each call */
	List	   *buffers;		/* RecoverBuffer */
	Addition   *additions;
	uint64		nadditions;		/* that are pinned */
	bool		due;			/* the counts are old, nobody knows how old */
	bool		marks;			/* the buffers will be loaded, */
	bool		completes;		/* and so will be all */
	Oid		   *empty;			/* to become empty_buffers, or NULL */
	int			nempty;
	int			most;			/* to become most_buffers, or 0 */
	bool		rotates;		/* the ledger, and this is to become
								 * SharedDatabase.rotate_at */
	uint64		rotate_at;
	bool		sweeps;			/* what was prepared, and this is to become */
	uint32		nleft;			/* SharedDatabase.nleft, */
	uint32		nseen;			/* or this, if it is rolled back */
} Recovery;

static Recovery *recoveries = NULL;

/*
 * Buffers that this process has found to have nothing that must be loaded, and
 * no shared part in which that could be noted.
 */
static Oid *empty_buffers = NULL;
static int	nempty_buffers = 0;

/*
 * How many buffers to load at a time, and after which to begin.  If that fails,
 * others are tried, and fewer, so that one that fails does not keep the others
 * from being loaded.
 */
static int	most_buffers = MANY_BUFFERS;
static Oid	last_buffer = InvalidOid;

/* ------------------------------------------------------------------------
 * The end of the transaction
 * ------------------------------------------------------------------------
 */

/* The transaction has committed.  Takes no lock, cannot fail. */
static void
commit(Recovery *recovery)
{
	SharedDatabase *database = ledger_database(MyDatabaseId, false);
	ClockTime	now = clock_now();
	ListCell   *lc;

	/* before the keys, so that the sums never show less than was stored */
	foreach(lc, recovery->buffers)
	{
		RecoverBuffer *buffer = lfirst(lc);

		if (buffer->shared != NULL)
			registry_count(buffer->shared, STAT_PUBLISHED, buffer->sum);
	}
	for (uint64 i = 0; i < recovery->nadditions; i++)
	{
		Addition   *addition = &recovery->additions[i];
		SharedBuffer *shared = addition->shared;

		counters_add_loaded(shared, &addition->pin, addition->count,
							recovery->due ? now - registry_interval(shared) : now);
	}
	pg_write_barrier();
	foreach(lc, recovery->buffers)
	{
		RecoverBuffer *buffer = lfirst(lc);

		if (!recovery->marks || buffer->shared == NULL)
			continue;
		registry_set_durable(buffer->shared, buffer->settings.durable);
		pg_atomic_write_u32(&buffer->shared->ledger_loaded, 1);
	}
	if (recovery->completes)
		pg_atomic_write_u32(&database->loaded, 1);
	if (recovery->rotates)
		pg_atomic_write_u64(&database->rotate_at, recovery->rotate_at);
	if (recovery->sweeps)
		pg_atomic_write_u32(&database->nleft, recovery->nleft);
	if (recovery->empty != NULL)
	{
		if (empty_buffers != NULL)
			pfree(empty_buffers);
		empty_buffers = recovery->empty;
		nempty_buffers = recovery->nempty;
	}
	if (recovery->most > 0)
		most_buffers = recovery->most;
}

/* The transaction has rolled back.  Takes no lock, cannot fail. */
static void
abort_recovery(Recovery *recovery)
{
	for (uint64 i = 0; i < recovery->nadditions; i++)
		counters_unpin(recovery->additions[i].shared,
					   &recovery->additions[i].pin);
	if (recovery->empty != NULL)
		pfree(recovery->empty);
	if (recovery->sweeps)
		pg_atomic_write_u32(&ledger_database(MyDatabaseId, false)->nleft,
							recovery->nseen);
}

static void
xact_callback(XactEvent event, void *arg)
{
	if (likely(recoveries == NULL))
		return;
	switch (event)
	{
		case XACT_EVENT_COMMIT:
			for (Recovery *each = recoveries; each; each = each->next)
				commit(each);
			recoveries = NULL;
			break;
		case XACT_EVENT_PRE_PREPARE:

			/* who calls recover_buffer() refuses that before */
			elog(ERROR, "cannot prepare a transaction that brings counts of the ledger into memory");
			break;
		case XACT_EVENT_ABORT:
			for (Recovery *each = recoveries; each; each = each->next)
				abort_recovery(each);
			recoveries = NULL;
			break;
		default:
			break;
	}
}

/* Begin to do something that takes effect when the transaction commits. */
static Recovery *
begin(void)
{
	static bool registered = false;
	Recovery   *recovery;

	if (!registered)
	{
		RegisterXactCallback(xact_callback, NULL);
		registered = true;
	}
	(void) registry_attach(true);
	(void) ledger_database(MyDatabaseId, true);
	recovery = MemoryContextAllocZero(TopTransactionContext, sizeof(Recovery));
	recovery->next = recoveries;
	recoveries = recovery;
	return recovery;
}

/*
 * Add a buffer to those whose counts are recovered.  Without settings, it is
 * gone.
 */
static void
add_buffer(Recovery *recovery, Oid relid, const BufferSettings *settings)
{
	MemoryContext oldcontext = MemoryContextSwitchTo(TopTransactionContext);
	RecoverBuffer *buffer = palloc0(sizeof(RecoverBuffer));

	buffer->relid = relid;
	buffer->gone = settings == NULL;
	if (settings != NULL)
		buffer->settings = *settings;
	recovery->buffers = lappend(recovery->buffers, buffer);
	MemoryContextSwitchTo(oldcontext);
}

/* ------------------------------------------------------------------------
 * Adding up rows
 * ------------------------------------------------------------------------
 */

static int
compare_epochs(const void *a, const void *b)
{
	uint64		number_a = ((const RecoverEpoch *) a)->number;
	uint64		number_b = ((const RecoverEpoch *) b)->number;

	return number_a < number_b ? -1 : (number_a > number_b ? 1 : 0);
}

/* Prepare to add up rows of these epochs. */
static EpochSums *
begin_sums(List *epochs)
{
	MemoryContext context = AllocSetContextCreate(TopTransactionContext,
												  "statbuffer ledger sums",
												  ALLOCSET_DEFAULT_SIZES);
	MemoryContext oldcontext = MemoryContextSwitchTo(context);
	EpochSums  *sums = palloc0(sizeof(EpochSums));
	ListCell   *lc;

	sums->context = context;
	sums->incarnation = ledger_database(MyDatabaseId, true)->incarnation;
	sums_begin(&sums->keys, context);
	sums->epochs = MemoryContextAllocHuge(context,
										  Max(list_length(epochs), 1) * sizeof(RecoverEpoch));
	foreach(lc, epochs)
	{
		LedgerEpoch *epoch = lfirst(lc);
		RecoverEpoch *copy = &sums->epochs[sums->nepochs++];

		memset(copy, 0, sizeof(RecoverEpoch));
		copy->number = epoch->number;
		copy->relid = epoch->relid;
		copy->shape = epoch->shape;
		copy->incarnation = sums->incarnation;
	}
	qsort(sums->epochs, sums->nepochs, sizeof(RecoverEpoch), compare_epochs);
	MemoryContextSwitchTo(oldcontext);
	return sums;
}

static void
end_sums(EpochSums *sums)
{
	MemoryContextDelete(sums->context);
}

/* Find an epoch, or NULL if its rows are not wanted. */
static RecoverEpoch *
find_epoch(EpochSums *sums, uint64 number)
{
	RecoverEpoch key = {.number = number};

	if (sums->recent == NULL || sums->recent->number != number)
		sums->recent = bsearch(&key, sums->epochs, sums->nepochs,
							   sizeof(RecoverEpoch), compare_epochs);
	return sums->recent;
}

/* Visitor: add up the rows of a ledger. */
static void
visit_row(LedgerRow *row, void *arg)
{
	EpochSums  *sums = arg;
	RecoverEpoch *epoch;

	if (sums->others && row->incarnation == sums->incarnation)
		return;
	epoch = find_epoch(sums, row->epoch);
	if (epoch == NULL ||
		(!sums->every && (epoch->buffer == NULL || epoch->buffer->gone)))
		return;
	if (epoch->others != NULL && row->incarnation != sums->incarnation)
		epoch = epoch->others;
	if (unlikely(row->damaged))
	{
		if (sums->writer != NULL)
		{
			sums->writer->incarnation =
				row->incarnation == sums->incarnation ? row->incarnation : 0;
			ledger_copy_row(sums->writer, row);
		}
		return;
	}
	sums_add_row(&sums->keys, epoch, row);
}

/*
 * Visitor: add up the rows of sb_ledger_prepared, and note which are to be
 * deleted.  What is damaged, or of a buffer that is not locked, is left.  What is
 * nobody's is left to the keeper, who alone may delete rows without a lock on a
 * buffer.
 */
static void
visit_prepared(LedgerRow *row, void *arg)
{
	EpochSums  *sums = arg;
	RecoverEpoch *epoch = find_epoch(sums, row->epoch);
	bool		is_nobodys = epoch == NULL ||
	(epoch->buffer != NULL && epoch->buffer->gone);

	if (is_nobodys ? !sums->sweeps : epoch->buffer == NULL || row->damaged)
	{
		sums->blocked |= !is_nobodys && epoch->buffer == NULL;
		sums->nleft++;
		return;
	}
	if (sums->ntids == sums->tids_size)
	{
		sums->tids_size = Max(2 * sums->tids_size, 64);
		if (sums->tids == NULL)
			sums->tids = MemoryContextAlloc(sums->context,
											sums->tids_size * sizeof(ItemPointerData));
		else
			sums->tids = repalloc_huge(sums->tids,
									   sums->tids_size * sizeof(ItemPointerData));
	}
	sums->tids[sums->ntids++] = row->tuple->t_self;
	if (!is_nobodys)
		sums_add_row(&sums->keys, epoch, row);
}

/* Add up the rows of a ledger that are visible now. */
static void
scan_ledger(Oid relid, EpochSums *sums)
{
	Relation	rel = table_open(relid, AccessShareLock);
	Snapshot	snapshot = RegisterSnapshot(GetLatestSnapshot());

	ledger_scan(rel, snapshot, visit_row, sums);
	UnregisterSnapshot(snapshot);
	table_close(rel, AccessShareLock);
}

/*
 * The same for both ledgers, for a session.  They are locked while both are read,
 * because the keeper moves counts from one to the other when it rotates them, and
 * empties the one under AccessExclusiveLock.
 *
 * Rows of a buffer that the session keeps others out of stay as they are, so
 * SnapshotSelf is as good as any.  In a serializable session it leaves no
 * predicate locks, which would have all who count conflict with it, and does not
 * look who has written what.
 */
static void
scan_ledgers(const LedgerTables *tables, EpochSums *sums)
{
	Relation	rels[lengthof(tables->ledgers)];

	for (int i = 0; i < lengthof(rels); i++)
		rels[i] = table_open(tables->ledgers[i], AccessShareLock);
	for (int i = 0; i < lengthof(rels); i++)
		ledger_scan(rels[i], SnapshotSelf, visit_row, sums);
	for (int i = 0; i < lengthof(rels); i++)
		table_close(rels[i], AccessShareLock);
}

static inline RecoverEpoch *
epoch_of(const KeySum *entry)
{
	return entry->key.of;
}

/* The sums of an epoch are listed from `first' on.  Returns where they end. */
static uint64
set_first(RecoverEpoch *epoch, uint64 first)
{
	uint64		end = first + epoch->nsums;

	epoch->nsums = first;
	return end;
}

/*
 * List the keys whose sum is not 0, those of an epoch one after the other.  Sets
 * `n' to their number.
 */
static KeySum **
list_sums(EpochSums *sums, uint64 *n)
{
	KeySum	  **list;
	KeySum	   *entry;
	keysums_iterator iterator;
	uint64		first = 0;

	*n = 0;
	keysums_start_iterate(sums->keys.hash, &iterator);
	while ((entry = keysums_iterate(sums->keys.hash, &iterator)) != NULL)
		if (entry->sum != 0)
		{
			epoch_of(entry)->nsums++;
			(*n)++;
		}
	for (int i = 0; i < sums->nepochs; i++)
	{
		RecoverEpoch *epoch = &sums->epochs[i];

		first = set_first(epoch, first);
		if (epoch->others != NULL)
			first = set_first(epoch->others, first);
	}
	list = MemoryContextAllocHuge(sums->context, Max(*n, 1) * sizeof(KeySum *));
	keysums_start_iterate(sums->keys.hash, &iterator);
	while ((entry = keysums_iterate(sums->keys.hash, &iterator)) != NULL)
		if (entry->sum != 0)
			list[epoch_of(entry)->nsums++] = entry;
	return list;
}

/* ------------------------------------------------------------------------
 * What is done with the sums
 * ------------------------------------------------------------------------
 */

/* Get a buffer's shared part, or make it. */
static void
make_shared(RecoverBuffer *buffer)
{
	bool		made;

	buffer->shared = registry_make(MyDatabaseId, buffer->relid,
								   &buffer->settings, &made);
	if (made)
		ddl_note_made(buffer->shared);
}

/*
 * Get the table of counters of an epoch, and if need be make the buffer's shared
 * part, and give it the shape.
 */
static CounterTable *
attach(RecoverEpoch *epoch)
{
	RecoverBuffer *buffer = epoch->buffer;
	CounterTable *table = &epoch->table;

	if (likely(table->partitions != NULL))
		return table;
	if (buffer->shared == NULL)
		make_shared(buffer);
	table_find_shape(&buffer->shared->table, epoch->shape, true, false, table);
	if (table->shape == TABLE_SHAPES)
	{
		/* the worker makes room, if it can */
		registry_ask(buffer->shared, REQUEST_RECHECK);
		ereport(ERROR,
				(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
				 errmsg("buffer %u holds keys of too many shapes",
						buffer->relid)));
	}
	table_attach(&buffer->shared->table, table);
	return table;
}

/*
 * Pin the counters of the keys, to which the sums are added at commit.  Whatever
 * can fail, fails here.
 */
static void
pin_sums(Recovery *recovery, KeySum **list, uint64 n)
{
	if (n == 0)
		return;
	Assert(recovery->additions == NULL);
	launch_ensure();
	recovery->additions = MemoryContextAllocHuge(TopTransactionContext,
												 n * sizeof(Addition));
	for (uint64 i = 0; i < n; i++)
	{
		KeySum	   *entry = list[i];
		RecoverEpoch *epoch = epoch_of(entry);
		CounterTable *table = attach(epoch);
		Addition   *addition = &recovery->additions[i];

		CHECK_FOR_INTERRUPTS();
		addition->shared = epoch->buffer->shared;
		addition->count = entry->sum;
		counters_pin_held(addition->shared, table, &entry->key.bytes,
						  entry->sum, &addition->pin);
		recovery->nadditions = i + 1;
		epoch->buffer->sum += (uint64) entry->sum;
	}
	counters_check_open();
}

/* Append sums to the ledger.  Returns how many bytes that were, about. */
static uint64
append_sums(LedgerWriter *writer, KeySum **list, uint64 n)
{
	RecoverEpoch *epoch = NULL;
	LedgerBody	body;
	uint64		nbytes = 0;

	for (uint64 i = 0; i < n; i++)
	{
		const SumKey *key = &list[i]->key;

		CHECK_FOR_INTERRUPTS();
		if (epoch_of(list[i]) != epoch)
		{
			if (epoch != NULL)
				ledger_end_body(writer, &body);
			epoch = epoch_of(list[i]);
			writer->incarnation = epoch->incarnation;
			ledger_begin_body(&body, epoch->number);
			nbytes += sizeof(HeapTupleHeaderData) + VARHDRSZ;
		}
		ledger_put(writer, &body, key->bytes.data, key->bytes.len,
				   list[i]->sum);
		nbytes += KEY_LENGTH(key->bytes.len) + sizeof(uint64);
	}
	if (epoch != NULL)
		ledger_end_body(writer, &body);
	return nbytes;
}

/* ------------------------------------------------------------------------
 * Which buffers
 * ------------------------------------------------------------------------
 */

/* A buffer that is recovered, by its relation. */
typedef struct BufferEntry
{
	Oid			relid;			/* hash key, must be first */
	RecoverBuffer *buffer;
} BufferEntry;

/*
 * Read the epochs, and prepare to add up their rows: those of buffers that are
 * recovered.  With `all', also those of others; rows of them are left.
 */
static EpochSums *
read_epochs(Recovery *recovery, bool all)
{
	List	   *epochs = ledger_read_epochs(InvalidOid);
	HASHCTL		ctl = {
		.keysize = sizeof(Oid),
		.entrysize = sizeof(BufferEntry),
		.hcxt = CurrentMemoryContext
	};
	HTAB	   *buffers = hash_create("statbuffer buffers to be recovered", 64,
									  &ctl, HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
	List	   *wanted = NIL;
	List	   *owners = NIL;
	EpochSums  *sums;
	ListCell   *lc;
	ListCell   *lc2;

	foreach(lc, recovery->buffers)
	{
		RecoverBuffer *buffer = lfirst(lc);
		BufferEntry *entry = hash_search(buffers, &buffer->relid, HASH_ENTER,
										 NULL);

		entry->buffer = buffer;
	}
	foreach(lc, epochs)
	{
		LedgerEpoch *epoch = lfirst(lc);
		BufferEntry *entry = hash_search(buffers, &epoch->relid, HASH_FIND,
										 NULL);

		if (entry == NULL && !all)
			continue;
		wanted = lappend(wanted, epoch);
		owners = lappend(owners, entry != NULL ? entry->buffer : NULL);
	}
	sums = begin_sums(wanted);
	forboth(lc, wanted, lc2, owners)
		find_epoch(sums, ((LedgerEpoch *) lfirst(lc))->number)->buffer = lfirst(lc2);
	sums->recent = NULL;
	hash_destroy(buffers);
	return sums;
}

/* What lock_buffer() has found. */
typedef enum LockResult
{
	LOCK_BUFFER,				/* a durable buffer, which is now locked */
	LOCK_OTHER,					/* the relation is not there, or not one */
	LOCK_BLOCKED				/* another session keeps us out */
} LockResult;

/*
 * Lock a durable buffer, or what should be one, without waiting, and read its
 * settings.  The lock keeps it as it is.
 */
static LockResult
lock_buffer(Oid relid, BufferSettings *settings)
{
	Relation	rel;
	bool		is_buffer;

	/* this also accepts invalidation messages */
	if (!ConditionalLockRelationOid(relid, RowExclusiveLock))
		return LOCK_BLOCKED;
	rel = try_relation_open(relid, NoLock);
	is_buffer = rel != NULL && buffer_read_settings(rel, settings) &&
		settings->durable;
	if (rel != NULL)
		relation_close(rel, NoLock);
	return is_buffer ? LOCK_BUFFER : LOCK_OTHER;
}

/*
 * Is a buffer that may not be locked loaded, as far as is known?  Locks a
 * partition of the registry.
 */
static bool
is_loaded(Oid relid)
{
	SharedBufferKey key = {MyDatabaseId, relid};
	SharedBuffer *shared = registry_lock(&key);
	bool		loaded;

	if (shared != NULL)
	{
		loaded = pg_atomic_read_u32(&shared->ledger_loaded) != 0;
		registry_unlock(shared);
		return loaded;
	}
	for (int i = 0; i < nempty_buffers; i++)
		if (empty_buffers[i] == relid)
			return true;
	return false;
}

/*
 * The buffers that are recovered and have nothing pinned: find the shared part
 * in which it is noted that they are loaded, or else have this process remember
 * it.  If another buffer is `blocked', that may take long, and whoever looks at
 * these is not to wait for it: make the shared part.
 */
static void
note_empty(Recovery *recovery, bool blocked)
{
	int			nbuffers = list_length(recovery->buffers);
	ListCell   *lc;

	recovery->empty = MemoryContextAllocHuge(TopMemoryContext,
											 (nempty_buffers + nbuffers) * sizeof(Oid) + 1);
	if (nempty_buffers > 0)
		memcpy(recovery->empty, empty_buffers, nempty_buffers * sizeof(Oid));
	recovery->nempty = nempty_buffers;
	foreach(lc, recovery->buffers)
	{
		RecoverBuffer *buffer = lfirst(lc);

		if (buffer->shared == NULL && blocked)
			make_shared(buffer);
		if (buffer->shared == NULL)
			buffer->shared = registry_find(MyDatabaseId, buffer->relid);
		if (buffer->shared == NULL)
			recovery->empty[recovery->nempty++] = buffer->relid;
	}
}

/*
 * Lock buffers that are to be loaded.  Returns whether any was left for another
 * time, and sets `blocked' if it was because another session keeps us out.
 */
static bool
choose_buffers(Recovery *recovery, bool *blocked)
{
	List	   *relids = ledger_list_relations(ledger_read_epochs(InvalidOid));
	int			n = list_length(relids);
	int			first = 0;
	int			most = most_buffers;
	bool		left = false;

	/* should this fail */
	most_buffers = Max(most / 2, 1);
	recovery->most = Min(most * 2, MANY_BUFFERS);

	while (first < n && list_nth_oid(relids, first) <= last_buffer)
		first++;
	for (int i = 0; i < n; i++)
	{
		Oid			relid = list_nth_oid(relids, (first + i) % n);
		BufferSettings settings;

		CHECK_FOR_INTERRUPTS();
		if (is_loaded(relid))
			continue;
		if (list_length(recovery->buffers) == most)
			return true;
		last_buffer = relid;
		switch (lock_buffer(relid, &settings))
		{
			case LOCK_BUFFER:
				add_buffer(recovery, relid, &settings);
				break;
			case LOCK_BLOCKED:
				left = *blocked = true;
				break;
			case LOCK_OTHER:
				UnlockRelationOid(relid, RowExclusiveLock);
				break;
		}
	}
	return left;
}

/* ------------------------------------------------------------------------
 * Tasks
 * ------------------------------------------------------------------------
 */

/*
 * Load what the ledger has of other incarnations, and memory does not have: of
 * some buffers, or all.
 */
RecoverResult
recover_load(void)
{
	Recovery   *recovery = begin();
	SharedDatabase *database = ledger_database(MyDatabaseId, true);
	LedgerTables tables;
	EpochSums  *sums;
	KeySum	  **list;
	uint64		n;
	bool		blocked = false;
	bool		left;

	if (pg_atomic_read_u32(&database->loaded) != 0)
		return RECOVER_DONE;
	ledger_find_tables(&tables, false);
	left = choose_buffers(recovery, &blocked);
	recovery->due = true;
	recovery->marks = true;
	recovery->completes = !left;
	if (recovery->buffers == NIL)
		return left ? RECOVER_LATER : RECOVER_DONE;

	sums = read_epochs(recovery, false);
	sums->others = true;
	for (int i = 0; i < lengthof(tables.ledgers); i++)
		scan_ledger(tables.ledgers[i], sums);
	list = list_sums(sums, &n);
	pin_sums(recovery, list, n);
	end_sums(sums);
	note_empty(recovery, blocked);
	if (n > 0)
		ereport(LOG,
				(errmsg("statbuffer loads counts of durable buffers from the ledger of database %u",
						MyDatabaseId),
				 errdetail_plural("They are of %llu key.", "They are of %llu keys.",
								  n, (unsigned long long) n)));
	if (!left)
		return RECOVER_DONE;
	return blocked ? RECOVER_LATER : RECOVER_MORE;
}

/* What the keeper looks for in sb_ledger_prepared. */
typedef struct PreparedRows
{
	SnapshotData snapshot;
	uint64	   *epochs;			/* those with visible rows, some several times */
	uint32		nepochs;
	uint32		size;
	uint32		n;				/* number of visible rows */
	bool		pending;		/* there are others */
} PreparedRows;

/* Visitor: look what there is. */
static void
look_at_prepared(LedgerRow *row, void *arg)
{
	PreparedRows *rows = arg;

	/* after each row, a dirty snapshot has the transaction that is at it */
	if (TransactionIdIsValid(rows->snapshot.xmin))
	{
		rows->pending = true;
		return;
	}
	rows->n++;
	if (rows->nepochs > 0 && rows->epochs[rows->nepochs - 1] == row->epoch)
		return;
	if (rows->nepochs == rows->size)
	{
		rows->size = Max(2 * rows->size, 64);
		rows->epochs = rows->epochs == NULL ?
			palloc(rows->size * sizeof(uint64)) :
			repalloc_huge(rows->epochs, rows->size * sizeof(uint64));
	}
	rows->epochs[rows->nepochs++] = row->epoch;
}

static int
compare_numbers(const void *a, const void *b)
{
	uint64		number_a = *(const uint64 *) a;
	uint64		number_b = *(const uint64 *) b;

	return number_a < number_b ? -1 : (number_a > number_b ? 1 : 0);
}

/*
 * Lock the buffers that the visible rows are of, as many as may be locked at a
 * time; others wait for the next sweep.
 */
static void
lock_swept_buffers(Recovery *recovery, PreparedRows *rows)
{
	List	   *wanted = NIL;
	ListCell   *lc;

	qsort(rows->epochs, rows->nepochs, sizeof(uint64), compare_numbers);
	foreach(lc, ledger_read_epochs(InvalidOid))
	{
		LedgerEpoch *epoch = lfirst(lc);

		if (bsearch(&epoch->number, rows->epochs, rows->nepochs,
					sizeof(uint64), compare_numbers) != NULL)
			wanted = lappend(wanted, epoch);
	}
	foreach(lc, ledger_list_relations(wanted))
	{
		Oid			relid = lfirst_oid(lc);
		BufferSettings settings;

		CHECK_FOR_INTERRUPTS();
		if (list_length(recovery->buffers) == MANY_BUFFERS)
			break;
		switch (lock_buffer(relid, &settings))
		{
			case LOCK_BUFFER:
				add_buffer(recovery, relid, &settings);
				break;
			case LOCK_OTHER:
				add_buffer(recovery, relid, NULL);
				break;
			case LOCK_BLOCKED:
				break;
		}
	}
}

/* Delete the rows of sb_ledger_prepared that were added up. */
static void
delete_rows(Relation rel, EpochSums *sums)
{
	for (uint64 i = 0; i < sums->ntids; i++)
	{
		CHECK_FOR_INTERRUPTS();
		simple_heap_delete(rel, &sums->tids[i]);
	}
}

/*
 * Count what prepared transactions have counted that are committed: delete the
 * rows, and append their sums to the ledger.
 */
RecoverResult
recover_sweep(void)
{
	Recovery   *recovery = begin();
	PreparedRows rows = {.n = 0};
	LedgerTables tables;
	Relation	rel;
	Snapshot	snapshot;
	EpochSums  *sums;
	KeySum	  **list;
	uint64		n;
	bool		blocked;

	ledger_find_tables(&tables, false);
	rel = table_open(tables.prepared, RowExclusiveLock);
	InitDirtySnapshot(rows.snapshot);
	ledger_scan(rel, &rows.snapshot, look_at_prepared, &rows);
	recovery->sweeps = true;
	recovery->nseen = rows.n;
	if (rows.n == 0)
	{
		table_close(rel, NoLock);
		return rows.pending ? RECOVER_LATER : RECOVER_DONE;
	}
	lock_swept_buffers(recovery, &rows);

	snapshot = RegisterSnapshot(GetLatestSnapshot());
	sums = read_epochs(recovery, true);
	sums->sweeps = true;
	ledger_scan(rel, snapshot, visit_prepared, sums);
	UnregisterSnapshot(snapshot);
	list = list_sums(sums, &n);
	pin_sums(recovery, list, n);
	if (n > 0)
	{
		LedgerWriter writer;

		ledger_open_current(&writer, false);
		(void) append_sums(&writer, list, n);
		ledger_close(&writer);
	}
	delete_rows(rel, sums);
	recovery->nleft = sums->nleft;
	blocked = sums->blocked;
	end_sums(sums);
	table_close(rel, NoLock);
	return blocked || rows.pending ? RECOVER_LATER : RECOVER_DONE;
}

/* Read the settings of a buffer that the transaction has altered. */
static void
read_settings(Oid relid, BufferSettings *settings)
{
	Relation	rel = relation_open(relid, NoLock);

	if (!buffer_read_settings(rel, settings))
		elog(ERROR, "relation %u is not a buffer", relid);
	relation_close(rel, NoLock);
}

/*
 * A buffer becomes durable: at commit, memory will have all that the ledger has of
 * it.  The caller has AccessExclusiveLock on it.
 */
void
recover_settle(Oid relid)
{
	Recovery   *recovery = begin();
	BufferSettings settings;

	read_settings(relid, &settings);
	add_buffer(recovery, relid, &settings);
	((RecoverBuffer *) linitial(recovery->buffers))->shared =
		registry_find(MyDatabaseId, relid);
	recovery->marks = true;
}

/*
 * A buffer ceases to be durable: at commit, memory will have all that was counted
 * in it.  The caller has AccessExclusiveLock on it, and deletes its epochs
 * afterwards.
 */
void
recover_buffer(Oid relid)
{
	SharedDatabase *database;
	SharedBuffer *shared;
	Recovery   *recovery;
	RecoverBuffer *buffer;
	Relation	rel;
	BufferSettings settings;
	LedgerTables tables;
	EpochSums  *sums;
	KeySum	  **list;
	uint64		n;

	read_settings(relid, &settings);
	ledger_find_tables(&tables, false);
	recovery = begin();
	recovery->due = true;
	database = ledger_database(MyDatabaseId, true);
	add_buffer(recovery, relid, &settings);
	shared = registry_find(MyDatabaseId, relid);

	rel = table_open(tables.prepared, RowExclusiveLock);
	sums = read_epochs(recovery, false);
	if (pg_atomic_read_u32(&database->loaded) == 0 &&
		(shared == NULL || pg_atomic_read_u32(&shared->ledger_loaded) == 0))
	{
		sums->others = true;
		scan_ledgers(&tables, sums);
	}
	ledger_scan(rel, SnapshotSelf, visit_prepared, sums);
	list = list_sums(sums, &n);
	pin_sums(recovery, list, n);
	delete_rows(rel, sums);
	end_sums(sums);
	table_close(rel, NoLock);
	buffer = linitial(recovery->buffers);
	if (buffer->shared == NULL)
		buffer->shared = shared;
	recovery->marks = true;
}

/*
 * Delete the epochs that are nobody's: those of what is not a durable buffer, or
 * no more.  Nobody can append to them, or delete them, as long as the relation is
 * locked.
 */
static void
delete_epochs(void)
{
	List	   *gone = NIL;
	ListCell   *lc;

	foreach(lc, ledger_list_relations(ledger_read_epochs(InvalidOid)))
	{
		Oid			relid = lfirst_oid(lc);
		BufferSettings settings;

		CHECK_FOR_INTERRUPTS();
		switch (lock_buffer(relid, &settings))
		{
			case LOCK_BUFFER:
				UnlockRelationOid(relid, RowExclusiveLock);
				break;
			case LOCK_OTHER:
				gone = lappend_oid(gone, relid);
				break;
			case LOCK_BLOCKED:
				break;
		}
	}
	if (gone == NIL)
		return;
	foreach(lc, ledger_read_epochs(InvalidOid))
	{
		LedgerEpoch *epoch = lfirst(lc);

		if (list_member_oid(gone, epoch->relid))
			ledger_delete_epoch(epoch);
	}
}

/* The size of a ledger, in bytes. */
static uint64
ledger_size(Oid relid)
{
	Relation	rel = table_open(relid, AccessShareLock);
	uint64		size = (uint64) RelationGetNumberOfBlocks(rel) * BLCKSZ;

	table_close(rel, AccessShareLock);
	return size;
}

/*
 * Which ledger is to be rotated?  First the one that is not current: it is large
 * if that has failed, or if it was the current one before a restart.  Returns -1 if
 * none is.
 */
static int
choose_ledger(SharedDatabase *database, const LedgerTables *tables)
{
	uint64		most = ledger_rotation_size(database);
	uint32		current = pg_atomic_read_u32(&database->current);

	if (ledger_size(tables->ledgers[1 - current]) >= most)
		return 1 - current;
	return ledger_size(tables->ledgers[current]) >= most ? (int) current : -1;
}

/*
 * Prepare to add up the rows of all epochs.  The sums of a buffer that is loaded
 * get our incarnation, because memory has all that its rows have.  Of another one,
 * rows of other incarnations are added up by themselves, and their sums are again
 * in no memory.
 *
 * No lock is needed: what is loaded remains so, and what is not is loaded by this
 * process, or by a session that at its commit deletes the epochs.
 */
static EpochSums *
begin_all_sums(SharedDatabase *database)
{
	EpochSums  *sums = begin_sums(ledger_read_epochs(InvalidOid));

	sums->every = true;
	for (int i = 0; i < sums->nepochs; i++)
	{
		RecoverEpoch *epoch = &sums->epochs[i];

		if (pg_atomic_read_u32(&database->loaded) != 0 ||
			is_loaded(epoch->relid))
			continue;
		epoch->others = MemoryContextAllocZero(sums->context,
											   sizeof(RecoverEpoch));
		epoch->others->number = epoch->number;
	}
	return sums;
}

/*
 * If a ledger is large, append the sums of what it has to the other one, which
 * becomes the current one if it is not, and empty it.
 *
 * As long as there is something to be loaded, this waits for nobody, because that
 * would wait, too.
 */
RecoverResult
recover_rotate(void)
{
	Recovery   *recovery = begin();
	SharedDatabase *database = ledger_database(MyDatabaseId, true);
	LedgerTables tables;
	LedgerWriter writer;
	LOCKTAG		tag;
	Relation	rel;
	int			old;
	EpochSums  *sums;
	KeySum	  **list;
	uint64		n;

	ledger_find_tables(&tables, false);
	old = choose_ledger(database, &tables);
	if (old < 0)
		return RECOVER_DONE;

	/*
	 * Whoever has it locked may still append to it, and has then committed
	 * when the lock is released.  Others see that it is not the current one.
	 * If anything fails from here on, it stays as it is, and its counts
	 * count.
	 */
	pg_atomic_write_u32(&database->current, 1 - old);
	pg_memory_barrier();
	if (pg_atomic_read_u32(&database->loaded) != 0)
	{
		SET_LOCKTAG_RELATION(tag, MyDatabaseId, tables.ledgers[old]);
		WaitForLockers(tag, ShareLock, false);
	}
	else if (!ConditionalLockRelationOid(tables.ledgers[old],
										 AccessExclusiveLock))
		return RECOVER_LATER;

	PushActiveSnapshot(GetLatestSnapshot());
	delete_epochs();
	sums = begin_all_sums(database);
	sums->writer = &writer;
	ledger_open_current(&writer, false);
	scan_ledger(tables.ledgers[old], sums);
	list = list_sums(sums, &n);
	recovery->rotates = true;
	recovery->rotate_at = 2 * append_sums(&writer, list, n);
	ledger_close(&writer);
	end_sums(sums);

	rel = table_open(tables.ledgers[old], AccessExclusiveLock);
	compat_new_storage(rel);
	table_close(rel, NoLock);
	PopActiveSnapshot();
	return RECOVER_DONE;
}
