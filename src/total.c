/*-------------------------------------------------------------------------
 *
 * total.c
 *	  What is stored for a key and what is counted, together.
 *
 * A flush moves a count from shared memory to the target.  The two are read one
 * after the other, so a flush that commits in between could be seen in both or
 * in neither.  To read each count exactly once, we
 *
 * 1. note how many batches of the buffer have ended (SharedInFlight.ended),
 * 2. take a snapshot, and read what is stored by it,
 * 3. read the counter: what it has counted, and what is in flight,
 * 4. note SharedInFlight.ended again, and start over if it has changed.
 *
 * If it has not, no count has left its flight between 1 and 4, so at most one
 * batch was in flight, and everything that batches before it have stored is
 * in the snapshot.  What is in flight is stored, for us, if the snapshot sees
 * its transaction; the worker notes which one that is before it commits.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/transam.h"
#include "catalog/pg_type.h"
#include "compat.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "pending.h"
#include "standby.h"
#include "storage/lock.h"
#include "table.h"
#include "target.h"
#include "total.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/snapmgr.h"

/* after this many attempts to read a total, we keep flushes out of the way */
#define ATTEMPTS_MAX		5

/* Raise an error if the buffer has no target. */
void
total_check_target(SbBuffer *buffer)
{
	if (buffer->options.target == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("buffer \"%s\" has no target", NameStr(buffer->name)),
				 errdetail("Where its counts are stored is known to its handler only."),
				 errhint("Set the buffer's option \"target\", or use sb_count() for what is not stored yet.")));
}

/* Write the statement that reads what is stored for a key. */
static char *
select_statement(const Target *target, const bool *isnull)
{
	StringInfoData statement;

	initStringInfo(&statement);
	appendStringInfo(&statement, "SELECT t.%s::pg_catalog.int8 FROM %s AS t WHERE ",
					 target->count, target->name);
	target_append_condition(&statement, target, "$", isnull);
	return statement.data;
}

/*
 * Get the statement's plan.  The caller has connected to SPI.  With nulls in the
 * key, the condition is another one, and the plan is not kept.
 */
static SPIPlanPtr
get_plan(Target *target, TupleDesc desc, const bool *isnull)
{
	Oid		   *types = palloc(desc->natts * sizeof(Oid));
	bool		any_null = false;

	for (int i = 0; i < desc->natts; i++)
	{
		types[i] = TupleDescAttr(desc, i)->atttypid;
		any_null |= isnull[i];
	}
	if (any_null)
		return target_prepare(target, select_statement(target, isnull),
							  desc->natts, types);
	if (target->plans[TARGET_SELECT] == NULL)
		target_keep(target, TARGET_SELECT,
					target_prepare(target, select_statement(target, NULL),
								   desc->natts, types));
	return target_plan(target, TARGET_SELECT);
}

/*
 * Read what is stored for a key, as of a snapshot and with the privileges of the
 * current user.  0 if there is no row.
 */
static int64
read_stored(Target *target, const BufferShape *shape, const KeyBytes *key,
			Snapshot snapshot)
{
	TupleDesc	desc = shape->desc;
	Datum	   *values;
	bool	   *isnull;
	char	   *nulls;
	bool		none = true;
	int64		stored = 0;

	SPI_connect();
	values = palloc(desc->natts * sizeof(Datum));
	isnull = palloc(desc->natts * sizeof(bool));
	nulls = palloc(desc->natts);
	key_deform(desc, key->data, key->len, values, isnull);
	for (int i = 0; i < desc->natts; i++)
		nulls[i] = isnull[i] ? 'n' : ' ';
	if (SPI_execute_snapshot(get_plan(target, desc, isnull), values, nulls,
							 snapshot, InvalidSnapshot, true, false, 1) != SPI_OK_SELECT)
		elog(ERROR, "could not read the target table");
	if (SPI_processed > 0)
	{
		Datum		value = SPI_getbinval(SPI_tuptable->vals[0],
										  SPI_tuptable->tupdesc, 1, &none);

		if (!none)
			stored = DatumGetInt64(value);
	}
	SPI_finish();
	return stored;
}

/*
 * Read what a buffer has counted for a key and what the snapshot does not see
 * stored.
 */
static int64
read_counted(SbBuffer *buffer, const KeyBytes *key, Snapshot snapshot)
{
	int64		count;
	int64		in_flight;
	TransactionId xid;

	if (!table_read(&buffer->table, key, &count, &in_flight))
		return 0;
	if (in_flight == 0)
		return count;

	/* after what is in flight: see SharedInFlight */
	pg_read_barrier();
	xid = pg_atomic_read_u32(&buffer->shared->in_flight.xid);
	if (TransactionIdIsValid(xid) && !XidInMVCCSnapshot(xid, snapshot) &&
		TransactionIdDidCommit(xid))
		return count;

	/* counters_pin() keeps the sum in range */
	return count + in_flight;
}

static int64
add(int64 a, int64 b)
{
	return DatumGetInt64(DirectFunctionCall2(int8pl, Int64GetDatum(a),
											 Int64GetDatum(b)));
}

/*
 * Read what is stored and counted once.  Returns false if a flush has ended in
 * between, so that it has to be read again.
 */
static bool
read_once(SbBuffer *buffer, const BufferShape *shape, const KeyBytes *key,
		  int64 *stored, int64 *counted)
{
	bool		counts;
	SharedBuffer *shared;
	uint32		ended = 0;
	SinkSource	source;
	Target	   *target;
	Snapshot	snapshot;
	BufferUse	use;

	/* what may wait comes before the moment of which the total is */
	buffer_get_source(buffer, &source);
	target = target_open(&source, false, AccessShareLock);
	if (standby_applies(buffer))
	{
		StandbyCounts *standby = standby_read(buffer, &snapshot);

		if (!standby_look_up(standby, key, counted))
			*counted = 0;
		buffer_begin_use(buffer, &use);
		*stored = read_stored(target, shape, key, snapshot);
		buffer_end_use(&use);
		UnregisterSnapshot(snapshot);
		return true;
	}
	counts = buffer_attach_for_key(buffer, key) && !pending_truncated(buffer);
	shared = buffer->shared;
	if (counts)
		ended = pg_atomic_read_u32(&shared->in_flight.ended);
	pg_memory_barrier();
	snapshot = RegisterSnapshot(GetLatestSnapshot());

	/* policies of row security may run user code */
	buffer_begin_use(buffer, &use);
	*stored = read_stored(target, shape, key, snapshot);
	buffer_end_use(&use);

	*counted = counts ? read_counted(buffer, key, snapshot) : 0;
	UnregisterSnapshot(snapshot);
	if (!counts)
		return true;
	pg_read_barrier();
	return ended == pg_atomic_read_u32(&shared->in_flight.ended);
}

/*
 * Likewise, while the worker is kept from flushing, if it is between two flushes
 * at this moment.
 */
static bool
read_undisturbed(SbBuffer *buffer, const BufferShape *shape,
				 const KeyBytes *key, int64 *stored, int64 *counted)
{
	LOCKTAG		gate;
	bool		done;

	buffer_set_gate_tag(&gate, buffer->relid);
	if (LockAcquire(&gate, ExclusiveLock, false, true) == LOCKACQUIRE_NOT_AVAIL)
		return false;
	done = read_once(buffer, shape, key, stored, counted);
	(void) LockRelease(&gate, ExclusiveLock, false);
	return done;
}

/*
 * Read what is stored for a key, and what is counted and not in that, including
 * what the transaction itself has added.
 *
 * If flushes follow so quickly that one ends in each attempt, the worker is kept
 * from starting another one for as long as it takes to read the target once.
 */
static void
read_both(SbBuffer *buffer, const BufferShape *shape, const KeyBytes *key,
		  int64 *stored, int64 *counted)
{
	int64		delta = 0;

	for (int attempt = 1;
		 !read_once(buffer, shape, key, stored, counted); attempt++)
	{
		CHECK_FOR_INTERRUPTS();
		if (attempt > ATTEMPTS_MAX &&
			read_undisturbed(buffer, shape, key, stored, counted))
			break;
	}

	if (buffer->pending != NULL)
		(void) pending_lookup(buffer, key, &delta);
	*counted = add(*counted, delta);
}

/*
 * Get what is stored for a key, plus what is counted, including what the
 * transaction itself has added.  The key was formed under `shape', which is the
 * buffer's.
 *
 * The caller has opened the buffer, which has a target.  Reads the target as the
 * current user, by a snapshot of its own in any transaction isolation level: by
 * an older one, what was stored since would be in neither part.
 *
 * Raises an error if the target cannot be read.
 */
int64
total_read(SbBuffer *buffer, const BufferShape *shape, const KeyBytes *key)
{
	int64		stored;
	int64		counted;

	read_both(buffer, shape, key, &stored, &counted);
	return add(stored, counted);
}

/*
 * Likewise, but only the part that is counted.  To a caller that has locked the
 * row of the key, or has deleted it or given it another key, this is what the row
 * does not have: what is being stored at this moment waits for the lock.
 */
int64
total_read_counted(SbBuffer *buffer, const BufferShape *shape,
				   const KeyBytes *key)
{
	int64		stored;
	int64		counted;

	read_both(buffer, shape, key, &stored, &counted);
	return counted;
}
