/*-------------------------------------------------------------------------
 *
 * shmem.c
 *	  The shared memory area, and the launcher's slot.
 *
 * A small struct that is found by its name (SharedControl) leads to one DSA
 * area.  The first process that needs the area creates it.
 *
 * For the lock order see SharedControl in shmem.h.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "clock.h"
#include "compat.h"
#include "counter.h"
#include "miscadmin.h"
#include "port/pg_bitutils.h"
#include "registry.h"
#include "settings.h"
#include "shmem.h"
#include "storage/ipc.h"
#include "utils/memutils.h"

/*
 * The system may take a long time to make a segment of shared memory, because it
 * clears all of it, and whoever needs memory waits meanwhile: 2 ms for 8 MB, but
 * 76 ms for 256 MB.  So segments are not larger than the smallest size with
 * which about so many of them make up statbuffer.max_memory.  (dsa.c can have
 * 1024 of them, and the server some hundreds, for all purposes.)
 */
#define SEGMENTS				128
#define SEGMENT_MIN_SIZE		((size_t) 8 * 1024 * 1024)

/* do not try again for so long after memory was out */
#define REFUSED_MSECS			100

SharedControl *shared_control = NULL;
dsa_area   *shared_area = NULL;

/*
 * Reserve space for SharedControl in the main segment.  Called from
 * shmem_request_hook.
 */
void
shmem_request(void)
{
	RequestAddinShmemSpace(SHARED_CONTROL_SIZE);
}

/*
 * Describe our layout.  The sizes are a safety net, in case the number was not
 * increased.
 */
static void
describe_layout(char *layout)
{
	snprintf(layout, SHARED_LAYOUT_SIZE, "%s (%zu, %zu, %zu)", SHARED_LAYOUT,
			 sizeof(SharedControl), sizeof(SharedBuffer),
			 sizeof(SharedCounter));
}

/* The names of the tranches, in the order of SharedTranches. */
static const char *const tranche_names[] = {
	"statbuffer_control", "statbuffer_area", "statbuffer_registry",
	"statbuffer_counters", "statbuffer_table", "statbuffer_totals"
};

StaticAssertDecl(lengthof(tranche_names) * sizeof(int) == sizeof(SharedTranches),
				 "every tranche must have a name");

static void
init_control(void *memory)
{
	SharedControl *control = memory;

	memset(control, 0, SHARED_CONTROL_SIZE);
	describe_layout(control->layout);
	for (int i = 0; i < lengthof(tranche_names); i++)
		((int *) &control->tranches)[i] = compat_new_tranche(tranche_names[i]);
	LWLockInitialize(&control->lock, control->tranches.control);
	control->area = DSM_HANDLE_INVALID;
	control->registry = InvalidDsaPointer;
	control->databases = InvalidDsaPointer;
	pg_atomic_init_u32(&control->spaces.current, 0);
	pg_atomic_init_u32(&control->spaces.moving, 0);
	for (int i = 0; i < SHARED_SPACES; i++)
	{
		pg_atomic_init_u32(&control->spaces.places[i].generation, 1);
		control->spaces.places[i].area = DSM_HANDLE_INVALID;
		pg_atomic_init_u64(&control->memory.nobjects[i], 0);
	}
	pg_atomic_init_u64(&control->memory.most, 0);
	pg_atomic_init_u32(&control->claims.closed, 0);
	pg_atomic_init_u32(&control->load.state, 0);
	pg_atomic_init_u64(&control->load.offset, 0);
	pg_atomic_init_u64(&control->load.reached, 0);
	ConditionVariableInit(&control->load.cv);
	pg_atomic_init_u64(&control->memory.nbytes, 0);
	pg_atomic_init_u64(&control->memory.refused_at, 0);
	pg_atomic_init_u64(&control->memory.exhausted_at, 0);
	pg_atomic_init_u32(&control->memory.short_of_memory, 0);
	pg_atomic_init_u64(&control->last_table, 0);
	pg_atomic_init_u32(&control->queue.waiting, 0);
	ConditionVariableInit(&control->drain_cv);
}

/*
 * Find SharedControl, or create it.
 *
 * If the library is not preloaded, it may have been replaced since another
 * process has created it.  A layout that is not ours is reported at `elevel',
 * and nothing in it is touched; if that is less than ERROR, returns false.
 */
bool
shmem_open(int elevel)
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

	for (int i = 0; i < lengthof(tranche_names); i++)
		compat_name_tranche(((int *) &control->tranches)[i], tranche_names[i]);
	shared_control = control;
	return true;
}

/*
 * How large may a segment of a new area be, where the version lets us choose?
 * It stays so when statbuffer.max_memory is changed.
 */
size_t
shmem_largest_segment(void)
{
	uint64		share = (uint64) statbuffer_max_memory * 1024 / SEGMENTS;

	return Max(SEGMENT_MIN_SIZE, (size_t) pg_nextpower2_64(share));
}

/*
 * Attach this process to the area for the rest of its life.  With `create' the
 * area is created if necessary; without, returns false if there is none.
 *
 * Raises an error if memory is out, or if the layout is not ours.  Takes
 * SharedControl.lock.
 */
bool
shmem_attach(bool create)
{
	MemoryContext oldcontext;
	dsa_area   *area;

	if (shared_area != NULL)
		return true;
	(void) shmem_open(ERROR);

	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	if (shared_control->area == DSM_HANDLE_INVALID && !create)
	{
		LWLockRelease(&shared_control->lock);
		return false;
	}
	oldcontext = MemoryContextSwitchTo(TopMemoryContext);
	if (shared_control->area != DSM_HANDLE_INVALID)
		area = dsa_attach(shared_control->area);
	else
	{
		area = compat_create_area(shared_control->tranches.area,
								  shmem_largest_segment());
		dsa_set_size_limit(area, (size_t) statbuffer_max_memory * 1024);
		dsa_pin(area);
		shared_control->area = dsa_get_handle(area);
	}
	dsa_pin_mapping(area);
	shared_area = area;
	MemoryContextSwitchTo(oldcontext);
	LWLockRelease(&shared_control->lock);
	return true;
}

/*
 * Attach this process, which is attached to the area, to a hash table in it, for
 * the rest of its life.  Its handle is in SharedControl.  With `create' the table
 * is created if necessary; without, returns NULL if there is none.
 *
 * Raises an error if memory is out.  Takes SharedControl.lock.
 */
dshash_table *
shmem_attach_table(dshash_table_handle *handle, Size key_size,
				   Size entry_size, bool create)
{
	dshash_parameters params = {
		.key_size = key_size,
		.entry_size = entry_size,
		.compare_function = dshash_memcmp,
		.hash_function = dshash_memhash,
		COMPAT_DSHASH_COPY_MEMCPY
		.tranche_id = shared_control->tranches.registry
	};
	MemoryContext oldcontext;
	dshash_table *table = NULL;

	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	oldcontext = MemoryContextSwitchTo(TopMemoryContext);
	if (DsaPointerIsValid(*handle))
		table = dshash_attach(shared_area, &params, *handle, NULL);
	else if (create)
	{
		table = dshash_create(shared_area, &params, NULL);
		*handle = dshash_get_hash_table_handle(table);
	}
	MemoryContextSwitchTo(oldcontext);
	LWLockRelease(&shared_control->lock);
	return table;
}

/*
 * Apply statbuffer.max_memory to the area, to which the process is attached.
 */
void
shmem_set_limit(void)
{
	dsa_set_size_limit(shared_area, (size_t) statbuffer_max_memory * 1024);
}

/*
 * Was memory out a moment ago?  Then what can be done without is not allocated.
 */
bool
shmem_has_refused(void)
{
	uint64		last = pg_atomic_read_u64(&shared_control->memory.refused_at);

	return last != 0 &&
		!clock_passed((ClockTime) last, clock_now(), REFUSED_MSECS);
}

/* Something that can be done without was allocated, or memory was out. */
void
shmem_note_refusal(bool refused)
{
	pg_atomic_uint64 *refused_at = &shared_control->memory.refused_at;

	if (refused)
		pg_atomic_write_u64(refused_at, (uint64) clock_now());
	else if (pg_atomic_read_u64(refused_at) != 0)
		pg_atomic_write_u64(refused_at, 0);
}

/*
 * Allocate what can be done without.  Returns InvalidDsaPointer if memory is
 * out, or was out a moment ago.  May raise other errors.
 *
 * When dsa.c cannot get a block for a small object, it leaks the block's
 * descriptor.  So the attempts must be few, or the descriptors keep segments
 * from being returned to the system.  (Keys are refused before that.)
 */
dsa_pointer
shmem_try_allocate(Size size, int flags)
{
	dsa_pointer pointer;

	if (shmem_has_refused())
		return InvalidDsaPointer;
	pointer = dsa_allocate_extended(shared_area, size,
									flags | DSA_ALLOC_NO_OOM);
	shmem_note_refusal(!DsaPointerIsValid(pointer));
	return pointer;
}

/* ------------------------------------------------------------------------
 * The launcher's slot
 * ------------------------------------------------------------------------
 */

/*
 * Become the launcher.  Returns false if there is one that does not want to be
 * replaced.  Takes SharedControl.lock.
 */
bool
launcher_slot_claim(void)
{
	SharedLauncher *launcher = &shared_control->launcher;
	bool		claimed = false;

	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	if (launcher->pid == 0 || launcher->leaving)
	{
		if (launcher->pid != 0)
			SetLatch(launcher->latch);
		launcher->pid = MyProcPid;
		launcher->latch = MyLatch;
		launcher->leaving = false;
		claimed = true;
	}
	LWLockRelease(&shared_control->lock);
	return claimed;
}

/*
 * Called by the launcher: allow, or no longer allow, another process to take
 * its place.  Returns false if one has.  Takes SharedControl.lock.
 */
bool
launcher_slot_offer(bool leaving)
{
	SharedLauncher *launcher = &shared_control->launcher;
	bool		is_mine;

	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	is_mine = launcher->pid == MyProcPid;
	if (is_mine)
		launcher->leaving = leaving;
	LWLockRelease(&shared_control->lock);
	return is_mine;
}

/*
 * Cease to be the launcher, unless another process has taken the place.  Takes
 * SharedControl.lock.
 */
void
launcher_slot_release(void)
{
	SharedLauncher *launcher = &shared_control->launcher;

	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	if (launcher->pid == MyProcPid)
		memset(launcher, 0, sizeof(SharedLauncher));
	LWLockRelease(&shared_control->lock);
}

/* Wake the launcher, if there is one.  Takes no lock, cannot fail. */
void
launcher_slot_wake(void)
{
	Latch	   *latch = *(Latch *volatile *) &shared_control->launcher.latch;

	if (latch != NULL)
		SetLatch(latch);
}

/*
 * Should the caller register a launcher?  Returns true to one caller, and
 * again only if the launcher has not come up for a while.  Takes
 * SharedControl.lock if there is no launcher.
 */
bool
launcher_slot_needs_process(void)
{
	SharedLauncher *launcher = &shared_control->launcher;
	ClockTime	now;
	bool		needed;

	if (launcher_slot_is_taken())
		return false;

	now = clock_now();
	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	needed = launcher->pid == 0 &&
		(launcher->asked == 0 ||
		 clock_passed(launcher->asked, now, LAUNCHER_START_MSECS));
	if (needed)
		launcher->asked = now;
	LWLockRelease(&shared_control->lock);
	return needed;
}
