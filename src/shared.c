/*-------------------------------------------------------------------------
 *
 * shared.c
 *	  The shared memory area and the registry of buffers.
 *
 * A small struct that is found by its name (SharedControl) leads to one DSA
 * area, which holds the registry, a dshash table of SharedBuffer, and all
 * counters.  All of it is made by the first process that needs it.
 *
 * The lock order stands at SharedControl in shared.h.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "compat.h"
#include "counters.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "shape.h"
#include "shared.h"
#include "statbuffer.h"
#include "storage/ipc.h"
#include "utils/memutils.h"

/*
 * Shapes stay for long, and are small.  If they were of a size that keys have,
 * too, each would keep a block from being given back when the keys are gone.
 */
#define SHAPE_MIN_ALLOC			256

/* how long after a worker that failed another is started */
#define WORKER_FAILED_MSECS		1000

SharedControl *shared_control = NULL;
dsa_area   *shared_area = NULL;
dshash_table *shared_registry = NULL;

/* the buffers that this process acts as the worker of: its own, and another */
static SharedBuffer *claims[2];

/* Reserve room for SharedControl in the main segment. */
void
shared_request(void)
{
	RequestAddinShmemSpace(SHARED_CONTROL_SIZE);
}

/* The sizes are for the layout that nobody has counted up. */
static void
describe_layout(char *layout)
{
	snprintf(layout, SHARED_LAYOUT_SIZE, "%s (%zu, %zu, %zu)", SHARED_LAYOUT,
			 sizeof(SharedControl), sizeof(SharedBuffer),
			 sizeof(SharedCounter));
}

static void
init_control(void *memory)
{
	SharedControl *control = memory;

	memset(control, 0, SHARED_CONTROL_SIZE);
	describe_layout(control->layout);
	control->tranche_control = compat_new_tranche("statbuffer_control");
	control->tranche_area = compat_new_tranche("statbuffer_area");
	control->tranche_registry = compat_new_tranche("statbuffer_registry");
	control->tranche_counters = compat_new_tranche("statbuffer_counters");
	control->tranche_buffer = compat_new_tranche("statbuffer_buffer");
	LWLockInitialize(&control->lock, control->tranche_control);
	pg_atomic_init_u32(&control->waiting, 0);
	pg_atomic_init_u32(&control->closed, 0);
	pg_atomic_init_u64(&control->nbytes, 0);
	pg_atomic_init_u32(&control->crowded, 0);
	pg_atomic_init_u32(&control->saved_state, 0);
	ConditionVariableInit(&control->saved_cv);
	ConditionVariableInit(&control->drain_cv);
}

/*
 * Get at SharedControl.  Not preloaded, the library may have been replaced
 * since another process has made it.  A layout that is not ours is reported,
 * and nothing of it touched; with an elevel below ERROR returns false then.
 * Who only wants to tell others of something leaves it at that.
 */
bool
shared_open(int elevel)
{
	char		layout[SHARED_LAYOUT_SIZE];
	SharedControl *control;

	if (shared_control != NULL)
		return true;

	StaticAssertStmt(sizeof(SharedControl) <= SHARED_CONTROL_SIZE,
					 "SharedControl must fit into its place");
	control = compat_shared_memory("statbuffer", SHARED_CONTROL_SIZE,
								   init_control);
	describe_layout(layout);
	if (strncmp(control->layout, layout, SHARED_LAYOUT_SIZE) != 0)
	{
		ereport(elevel,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("statbuffer's library was replaced by another version while the server was running"),
				 errdetail("The server has \"%.*s\", the library that is installed now has \"%s\".",
						   SHARED_LAYOUT_SIZE - 1, control->layout, layout),
				 errhint("Restart the server.")));
		return false;
	}

	compat_name_tranche(control->tranche_control, "statbuffer_control");
	compat_name_tranche(control->tranche_area, "statbuffer_area");
	compat_name_tranche(control->tranche_registry, "statbuffer_registry");
	compat_name_tranche(control->tranche_counters, "statbuffer_counters");
	compat_name_tranche(control->tranche_buffer, "statbuffer_buffer");
	shared_control = control;
	return true;
}

/*
 * Attach this process to the area for the rest of its life.
 *
 * With `create' the area is made when it is not there; otherwise returns
 * false then.  Raises an error when memory is out.
 */
bool
shared_attach(bool create)
{
	dshash_parameters params = {
		.key_size = sizeof(SharedBufferKey),
		.entry_size = sizeof(SharedBuffer),
		.compare_function = dshash_memcmp,
		.hash_function = dshash_memhash,
		COMPAT_DSHASH_COPY_MEMCPY
	};
	MemoryContext oldcontext;
	dsa_area   *area;
	dshash_table *registry;

	if (shared_registry != NULL)
		return true;

	(void) shared_open(ERROR);
	params.tranche_id = shared_control->tranche_registry;

	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	if (!shared_control->ready && !create)
	{
		LWLockRelease(&shared_control->lock);
		return false;
	}

	oldcontext = MemoryContextSwitchTo(TopMemoryContext);
	if (shared_control->ready)
	{
		/* an earlier attempt may have come half way */
		if (shared_area == NULL)
		{
			area = dsa_attach(shared_control->area);
			dsa_pin_mapping(area);
			shared_area = area;
		}
		registry = dshash_attach(shared_area, &params,
								 shared_control->registry, NULL);
	}
	else
	{
		/*
		 * Until it is pinned the area belongs to this process, and goes away
		 * if the registry can't be made.
		 */
		area = dsa_create(shared_control->tranche_area);
		registry = dshash_create(area, &params, NULL);
		dsa_set_size_limit(area, (size_t) statbuffer_max_memory * 1024);
		dsa_pin(area);
		dsa_pin_mapping(area);
		shared_control->area = dsa_get_handle(area);
		shared_control->registry = dshash_get_hash_table_handle(registry);
		shared_control->ready = true;
		shared_area = area;
	}
	shared_registry = registry;
	MemoryContextSwitchTo(oldcontext);
	LWLockRelease(&shared_control->lock);

	return true;
}

/* Put statbuffer.max_memory into force. */
void
shared_set_limit(void)
{
	dsa_set_size_limit(shared_area, (size_t) statbuffer_max_memory * 1024);
}

/*
 * Unmap segments that others have freed: a segment's memory goes back to the
 * system when the last process does.  dsa.c looks for them whenever it is
 * asked for an address, be it only this one.
 */
void
shared_unmap_freed(void)
{
	(void) dsa_get_address(shared_area, shared_control->registry);
}

/*
 * Find a buffer in the registry; NULL when it is not there.
 *
 * The caller holds a lock on the relation, or is the buffer's worker, so that
 * the buffer stays.
 */
SharedBuffer *
shared_find_buffer(Oid dboid, Oid relid)
{
	SharedBufferKey key = {dboid, relid};
	SharedBuffer *buffer;

	buffer = dshash_find(shared_registry, &key, false);
	if (buffer != NULL)
		dshash_release_lock(shared_registry, buffer);
	return buffer;
}

/*
 * Find a buffer in the registry, or make it, with the owner and the interval
 * (in microseconds) that it has at the moment.  The caller holds a lock on the
 * relation, which keeps the buffer; the launcher, which cannot, must claim it
 * before it touches it.  Raises an error when memory is out.
 */
SharedBuffer *
shared_make_buffer(Oid dboid, Oid relid, Oid owner, int64 interval)
{
	SharedBufferKey key = {dboid, relid};
	SharedBuffer *buffer;
	dshash_table *table;
	bool		found;

	buffer = shared_find_buffer(dboid, relid);
	if (buffer != NULL)
		return buffer;

	/* made beforehand, because it can fail */
	table = counters_create_table();
	PG_TRY();
	{
		buffer = dshash_find_or_insert(shared_registry, &key, &found);
	}
	PG_CATCH();
	{
		dshash_destroy(table);
		PG_RE_THROW();
	}
	PG_END_TRY();

	if (!found)
	{
		memset((char *) buffer + sizeof(SharedBufferKey), 0,
			   sizeof(SharedBuffer) - sizeof(SharedBufferKey));
		buffer->table = dshash_get_hash_table_handle(table);
		buffer->table_number = 1;
		pg_atomic_init_u32(&buffer->owner, owner);
		pg_atomic_init_u64(&buffer->nkeys, 0);
		pg_atomic_init_u64(&buffer->nbytes, 0);
		pg_atomic_init_u64(&buffer->flush_requests, InvalidDsaPointer);
		buffer->flush_taken = InvalidDsaPointer;
		pg_atomic_init_u32(&buffer->flush_all, 0);
		pg_atomic_init_u32(&buffer->truncated, 0);
		pg_atomic_init_u32(&buffer->recheck, 0);
		pg_atomic_init_u32(&buffer->parked, 0);
		pg_atomic_init_u32(&buffer->relieve, 0);
		pg_atomic_init_u64(&buffer->halt_at, 0);
		pg_atomic_init_u64(&buffer->drain_asked, 0);
		pg_atomic_init_u64(&buffer->drain_done, 0);
		pg_atomic_init_u64(&buffer->drain_due, 0);
		pg_atomic_init_u64(&buffer->drain_round, 0);
		pg_atomic_init_u64(&buffer->drain_keys, 0);
		pg_atomic_init_u32(&buffer->locked_out, 0);
		buffer->oldest_idle = SCHEDULE_NEVER;
		buffer->reap_at = SCHEDULE_NEVER;
		pg_atomic_init_u64(&buffer->in_flight, 0);
		pg_atomic_init_u32(&buffer->failing, 0);
		pg_atomic_init_u64(&buffer->last_flush, 0);
		for (int i = 0; i < STAT_COUNT; i++)
			pg_atomic_init_u64(&buffer->stats[i], 0);
		for (int i = 0; i < SHARED_SHAPES; i++)
			buffer->shapes[i] = InvalidDsaPointer;
		LWLockInitialize(&buffer->lock, shared_control->tranche_buffer);
		buffer->stats_reset = GetCurrentTimestamp();
		schedule_init(&buffer->schedule, interval, clock_now());
	}
	dshash_release_lock(shared_registry, buffer);

	if (found)
		dshash_destroy(table);
	else
		dshash_detach(table);
	return buffer;
}

/* A shape of a buffer, or NULL.  The caller holds SharedBuffer.lock. */
static KeyShape *
shape_at(SharedBuffer *buffer, int number)
{
	return dsa_get_address(shared_area, buffer->shapes[number]);
}

/*
 * Find out the number that keys of a shape have in a buffer, and the set of
 * those numbers of which keys can be read under the shape, and put them into
 * `table'.  The number is SHARED_SHAPES, which no key has, when there is none
 * yet; with `create' only when there is no room for one.  The caller has a
 * lock on the relation, or has claimed the buffer.
 *
 * Raises an error when memory is out.  Takes SharedBuffer.lock.
 */
void
shared_find_shape(SharedBuffer *buffer, const KeyShape *shape, bool create,
				  CounterTable *table)
{
	int			found = SHARED_SHAPES;
	int			unused = SHARED_SHAPES;
	uint32		readable = 0;
	dsa_pointer copy = InvalidDsaPointer;

	LWLockAcquire(&buffer->lock, LW_EXCLUSIVE);
	for (int i = SHARED_SHAPES - 1; i >= 0; i--)
	{
		KeyShape   *other = shape_at(buffer, i);

		if (other == NULL)
		{
			unused = i;
			continue;
		}
		if (shape_equal(shape, other))
			found = i;
		if (shape_can_read(shape, other))
			readable |= (uint32) 1 << i;
	}
	create = create && found == SHARED_SHAPES && unused < SHARED_SHAPES;
	if (create)
		copy = dsa_allocate_extended(shared_area,
									 Max(shape->size, SHAPE_MIN_ALLOC),
									 DSA_ALLOC_NO_OOM);
	if (DsaPointerIsValid(copy))
	{
		memcpy(dsa_get_address(shared_area, copy), shape, shape->size);
		buffer->shapes[unused] = copy;
		buffer->shapes_number++;
		readable |= (uint32) 1 << unused;
		found = unused;
	}
	table->shape = found;
	table->readable = readable;
	table->shapes_number = buffer->shapes_number;
	LWLockRelease(&buffer->lock);

	if (create && !DsaPointerIsValid(copy))
		counters_report_out_of_memory();
}

/* How many shapes a buffer has.  Takes SharedBuffer.lock. */
int
shared_count_shapes(SharedBuffer *buffer)
{
	int			n = 0;

	LWLockAcquire(&buffer->lock, LW_SHARED);
	for (int i = 0; i < SHARED_SHAPES; i++)
		if (DsaPointerIsValid(buffer->shapes[i]))
			n++;
	LWLockRelease(&buffer->lock);
	return n;
}

/*
 * Remove the shapes that no key has, which are those that are not in the set
 * `used'.  The caller is the buffer's worker and holds AccessExclusiveLock on
 * the relation, or is about to remove the buffer.
 */
void
shared_remove_shapes(SharedBuffer *buffer, uint32 used)
{
	LWLockAcquire(&buffer->lock, LW_EXCLUSIVE);
	buffer->shapes_number++;
	for (int i = 0; i < SHARED_SHAPES; i++)
	{
		if (!DsaPointerIsValid(buffer->shapes[i]) ||
			(used & ((uint32) 1 << i)) != 0)
			continue;
		dsa_free(shared_area, buffer->shapes[i]);
		buffer->shapes[i] = InvalidDsaPointer;
	}
	LWLockRelease(&buffer->lock);
}

/* Note that this process has ceased to act as the worker of a buffer. */
static void
forget_claim(SharedBuffer *buffer)
{
	for (int i = 0; i < lengthof(claims); i++)
		if (claims[i] == buffer)
			claims[i] = NULL;
}

/*
 * Remove a buffer that the caller has claimed as its worker would, and whose
 * counters and table it has freed.
 */
void
shared_remove_buffer(SharedBuffer *buffer)
{
	SharedBufferKey key = buffer->key;

	Assert(buffer->worker_pid == MyProcPid);
	forget_claim(buffer);
	dshash_delete_key(shared_registry, &key);
	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	shared_control->nclaimed--;
	LWLockRelease(&shared_control->lock);
	ConditionVariableBroadcast(&shared_control->drain_cv);
}

/*
 * Become the worker of a buffer.  Returns NULL when it is gone, or has a
 * worker, or the counts are being saved by another process.
 *
 * The caller sees to it that shared_release_worker() is called or the buffer
 * removed; shared_release_claims() does so when the process ends.
 */
SharedBuffer *
shared_claim_worker(Oid dboid, Oid relid)
{
	SharedBufferKey key = {dboid, relid};
	SharedBuffer *buffer;
	int			i = 0;
	bool		claimed = false;

	while (claims[i] != NULL)
		i++;
	Assert(i < lengthof(claims));

	/* the partition's lock keeps the buffer until it is ours */
	buffer = dshash_find(shared_registry, &key, false);
	if (buffer == NULL)
		return NULL;

	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	if (buffer->worker_pid == 0 &&
		(pg_atomic_read_u32(&shared_control->closed) == 0 ||
		 shared_control->launcher_pid == MyProcPid))
	{
		buffer->worker_pid = MyProcPid;
		buffer->worker_latch = MyLatch;

		/*
		 * A worker that was on its way when the launcher claimed the buffer,
		 * to load counts, did not fail to come up.
		 */
		buffer->worker_connected = shared_control->launcher_pid == MyProcPid;
		shared_control->nclaimed++;
		claims[i] = buffer;
		claimed = true;
	}
	LWLockRelease(&shared_control->lock);
	dshash_release_lock(shared_registry, buffer);
	return claimed ? buffer : NULL;
}

/*
 * Cease to be the worker of a buffer, and let the launcher see to what is
 * left there.  One that failed is not followed by another at once.
 */
void
shared_release_worker(SharedBuffer *buffer, int code)
{
	forget_claim(buffer);
	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	Assert(buffer->worker_pid == MyProcPid);
	buffer->worker_pid = 0;
	buffer->worker_latch = NULL;
	buffer->left_at = clock_now();
	if (code != 0)
		buffer->start_after = Max(buffer->start_after,
								  clock_add(buffer->left_at, WORKER_FAILED_MSECS));
	shared_control->nclaimed--;
	LWLockRelease(&shared_control->lock);

	if (shared_control->launcher_pid != MyProcPid)
		shared_wake_launcher();
}

/* Cease to be the worker of every buffer; also when the process ends. */
void
shared_release_claims(int code)
{
	for (int i = 0; i < lengthof(claims); i++)
		if (claims[i] != NULL)
			shared_release_worker(claims[i], code);
}

/*
 * Have nobody count or flush any more, because the counts are about to be
 * saved.  Returns false, and changes nothing, when buffers have workers.  The
 * caller is the launcher, or acts as it.
 */
bool
shared_close(void)
{
	bool		closed = false;

	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	Assert(shared_control->launcher_pid == MyProcPid);
	if (shared_control->nclaimed == 0)
	{
		pg_atomic_write_u32(&shared_control->closed, 1);
		closed = true;
	}
	LWLockRelease(&shared_control->lock);

	/* what is closed is known before anyone looks at pins */
	pg_memory_barrier();
	return closed;
}

/* Become the launcher; false when there is one that is to stay. */
bool
shared_claim_launcher(void)
{
	bool		claimed = false;

	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	if (shared_control->launcher_pid == 0 || shared_control->launcher_leaving)
	{
		if (shared_control->launcher_pid != 0)
			SetLatch(shared_control->launcher_latch);
		shared_control->launcher_pid = MyProcPid;
		shared_control->launcher_latch = MyLatch;
		shared_control->launcher_leaving = false;
		claimed = true;
	}
	LWLockRelease(&shared_control->lock);
	return claimed;
}

/*
 * Called by the launcher: may another one take its place from now on?  Returns
 * false when one has.
 */
bool
shared_offer_launcher(bool leaving)
{
	bool		is_launcher;

	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	is_launcher = shared_control->launcher_pid == MyProcPid;
	if (is_launcher)
		shared_control->launcher_leaving = leaving;
	LWLockRelease(&shared_control->lock);
	return is_launcher;
}

/* Cease to be the launcher, unless another one has taken the place. */
void
shared_release_launcher(void)
{
	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	if (shared_control->launcher_pid == MyProcPid)
	{
		shared_control->launcher_pid = 0;
		shared_control->launcher_latch = NULL;
		shared_control->launcher_leaving = false;
		shared_control->launcher_asked = 0;
	}
	LWLockRelease(&shared_control->lock);
}

/* Takes no lock, cannot fail.  Without a launcher does nothing. */
void
shared_wake_launcher(void)
{
	Latch	   *latch = *(Latch *volatile *) &shared_control->launcher_latch;

	if (latch != NULL)
		SetLatch(latch);
}

/*
 * Is it on the caller to register a launcher?  Says so to one caller at a
 * time, and again only when the launcher has not come up for a while.
 */
bool
shared_needs_launcher(void)
{
	ClockTime	now;
	bool		needed;

	/* the usual case, without a lock */
	if (*(volatile pid_t *) &shared_control->launcher_pid != 0)
		return false;

	now = clock_now();
	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	needed = shared_control->launcher_pid == 0 &&
		(shared_control->launcher_asked == 0 ||
		 clock_passed(shared_control->launcher_asked, now, LAUNCHER_START_MSECS));
	if (needed)
		shared_control->launcher_asked = now;
	LWLockRelease(&shared_control->lock);
	return needed;
}

/*
 * Keep workers out of a database until then; a time in the past lets them in
 * again.
 */
void
shared_evict_database(Oid dboid, ClockTime until)
{
	int			slot = 0;

	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	for (int i = 0; i < SHARED_EVICTIONS; i++)
	{
		if (shared_control->evictions[i].dboid == dboid)
		{
			slot = i;
			break;
		}
		if (shared_control->evictions[i].until <
			shared_control->evictions[slot].until)
			slot = i;
	}
	shared_control->evictions[slot].dboid = dboid;
	shared_control->evictions[slot].until = until;
	LWLockRelease(&shared_control->lock);
}

/* Until when workers must keep out of a database; 0 for not at all. */
ClockTime
shared_evicted_until(Oid dboid)
{
	ClockTime	until = 0;

	LWLockAcquire(&shared_control->lock, LW_SHARED);
	for (int i = 0; i < SHARED_EVICTIONS; i++)
		if (shared_control->evictions[i].dboid == dboid)
			until = shared_control->evictions[i].until;
	LWLockRelease(&shared_control->lock);
	return until > clock_now() ? until : 0;
}

/*
 * Remember a buffer's last error.  `broken' tells that the buffer itself
 * fails (its shape, owner or handler), and not only a key.
 */
void
shared_set_error(SharedBuffer *buffer, const char *message, bool broken)
{
	int			len = pg_mbcliplen(message, strlen(message),
								   SHARED_ERROR_SIZE - 1);

	LWLockAcquire(&buffer->lock, LW_EXCLUSIVE);
	memcpy(buffer->last_error, message, len);
	buffer->last_error[len] = '\0';
	buffer->last_error_at = GetCurrentTimestamp();
	buffer->broken = broken;
	LWLockRelease(&buffer->lock);
}

/* The buffer works again; its last error stays to be read. */
void
shared_mend(SharedBuffer *buffer)
{
	if (buffer->broken)
	{
		LWLockAcquire(&buffer->lock, LW_EXCLUSIVE);
		buffer->broken = false;
		LWLockRelease(&buffer->lock);
	}
}
