/*-------------------------------------------------------------------------
 *
 * hashtable_test.c
 *	  src/hashtable.c in one process with threads, for the thread sanitizer.
 *
 * The server's processes share memory in a way that no sanitizer follows.  So
 * what hashtable.c calls is replaced here: its memory comes from malloc(), and
 * its locks are those of POSIX threads.
 *
 * usage: hashtable_test SEED
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <pthread.h>
#include <unistd.h>

#include "hashtable.h"

/* the server has its own, which we do not link */
#undef printf
#undef sprintf

#define MAKERS			3		/* threads that make keys and delete them */
#define SCANNERS		2		/* threads that scan all the time */
#define KEYS			20000	/* keys of each maker */
#define STABLE_KEYS		5000	/* keys that are there all the time */
#define ROUNDS			2		/* how often they grow and shrink */
#define LOADED			4000	/* keys that are loaded */
#define LARGE			200000	/* keys of a large table */
#define PAUSES			4		/* where a scan is interrupted */
#define PORTION			1000	/* keys that are taken at a time */
#define MOVED			512		/* counters that are moved at a time */
#define TRANCHE			1

static SharedControl control;
SharedControl *shared_control = &control;
LocalSpace	space_local[SHARED_SPACES];

/* ------------------------------------------------------------------------
 * What hashtable.c calls
 * ------------------------------------------------------------------------
 */

static long blocks = 0;			/* allocated and not freed */
static unsigned int refusals = 0;	/* how many allocations were refused */
static _Thread_local unsigned int random_state;

static unsigned int
next_random(void)
{
	random_state = random_state * 1103515245 + 12345;
	return random_state >> 8;
}

void *
dsa_get_address(dsa_area *area, dsa_pointer pointer)
{
	return (void *) (uintptr_t) pointer;
}

void
space_attach(int place)
{
}

/* All memory is the same, but pointers say in which place it is. */
static int	present = 0;

static dsa_pointer
allocate(Size size)
{
	int			place = __atomic_load_n(&present, __ATOMIC_RELAXED);

	__atomic_fetch_add(&blocks, 1, __ATOMIC_RELAXED);
	return (dsa_pointer) (uintptr_t) calloc(1, size) |
		(dsa_pointer) place << SPACE_SHIFT;
}

dsa_pointer
space_try_allocate(Size size, int flags)
{
	if (next_random() % 8 == 0)
	{
		__atomic_fetch_add(&refusals, 1, __ATOMIC_RELAXED);
		return InvalidDsaPointer;
	}
	return allocate(size);
}

void
space_free(dsa_pointer pointer)
{
	__atomic_fetch_sub(&blocks, 1, __ATOMIC_RELAXED);
	free((void *) (uintptr_t) (pointer & SPACE_MASK));
}

/* Locks are numbered as they are initialized; the tranche is the number. */
static pthread_rwlock_t locks[HASH_PARTITIONS];
static int	nlocks = 0;
static _Thread_local LWLock *held = NULL;
static _Thread_local LWLockMode held_mode;

/* whoever has a lock has this one, too; it keeps the place from changing */
static pthread_rwlock_t no_change = PTHREAD_RWLOCK_INITIALIZER;

void
LWLockInitialize(LWLock *lock, int tranche)
{
	lock->tranche = nlocks;
	pthread_rwlock_init(&locks[nlocks++], NULL);
}

bool
LWLockAcquire(LWLock *lock, LWLockMode mode)
{
	pthread_rwlock_rdlock(&no_change);
	if (mode == LW_EXCLUSIVE)
		pthread_rwlock_wrlock(&locks[lock->tranche]);
	else
		pthread_rwlock_rdlock(&locks[lock->tranche]);
	held = lock;
	held_mode = mode;
	return true;
}

void
LWLockRelease(LWLock *lock)
{
	held = NULL;
	pthread_rwlock_unlock(&locks[lock->tranche]);
	pthread_rwlock_unlock(&no_change);
}

bool
LWLockHeldByMeInMode(LWLock *lock, LWLockMode mode)
{
	return held == lock && held_mode == mode;
}

uint32
key_hash(const char *data, uint16 len)
{
	uint32		hash = 2166136261U;

	for (int i = 0; i < len; i++)
		hash = (hash ^ (unsigned char) data[i]) * 16777619U;
	hash ^= hash >> 15;
	hash *= 0x2c1b3c6dU;
	return hash ^ hash >> 13;
}

static void
fail(const char *what, long number)
{
	printf("failed: %s: %ld\n", what, number);
	fflush(stdout);
	abort();
}

#if PG_VERSION_NUM >= 160000
void
ExceptionalCondition(const char *condition, const char *file, int line)
{
	fail(condition, line);
	abort();
}
#else
void
ExceptionalCondition(const char *condition, const char *type, const char *file,
					 int line)
{
	fail(condition, line);
	abort();
}
#endif

/* ------------------------------------------------------------------------
 * The test
 * ------------------------------------------------------------------------
 */

static HashPartition partitions[HASH_PARTITIONS];
static pg_atomic_uint64 nmoved;
static int	working = MAKERS;
static long scans = 0;

/* The key of a number; keys of all makers and the stable ones differ. */
static void
make_key(int maker, int number, char *space, KeyBytes *key)
{
	key->len = sprintf(space, "%d/%d", maker, number);
	key->data = space;
	key->hash = key_hash(key->data, key->len);
}

/* Make a counter that is not in the table yet, for a key. */
static CounterRef
make_counter(const KeyBytes *key)
{
	CounterRef	ref;

	ref.self = allocate(offsetof(SharedCounter, key) + key->len);
	ref.counter = counter_at(ref.self);
	ref.counter->keylen = key->len;
	ref.counter->shape = 0;
	memcpy(ref.counter->key, key->data, key->len);
	return ref;
}

/* Find a key, or make it.  Returns whether it was made. */
static bool
find_or_make(int maker, int number)
{
	char		space[32];
	KeyBytes	key;
	HashSpare	spare;
	CounterRef	ref;
	LWLock	   *lock;
	bool		made = false;

	make_key(maker, number, space, &key);
	lock = hash_lock(partitions, key.hash, LW_SHARED);
	ref = hash_find(partitions, &key, 0);
	if (ref.counter == NULL)
		hash_plan(partitions, key.hash, &spare);
	LWLockRelease(lock);
	if (ref.counter != NULL)
		return false;

	ref = make_counter(&key);
	hash_prepare(&spare);
	lock = hash_lock(partitions, key.hash, LW_EXCLUSIVE);
	if (hash_find(partitions, &key, 0).counter == NULL)
	{
		hash_insert(partitions, key.hash, ref, &spare);
		made = true;
	}
	LWLockRelease(lock);
	hash_free_spare(&spare);
	if (!made)
		space_free(ref.self);
	return made;
}

/* Delete a maker's keys.  Returns how many. */
static long
delete_keys(int maker)
{
	HashScan	scan;
	CounterRef	ref;
	long		n = 0;

	hash_begin_scan(&scan, partitions, LW_EXCLUSIVE);
	while (hash_begin_portion(&scan))
		while ((ref = hash_next(&scan)).counter != NULL)
			if (ref.counter->key[0] == '0' + maker)
			{
				hash_delete_current(&scan);
				space_free(ref.self);
				n++;
			}
	return n;
}

/*
 * Empty the table as when its buffer is removed, in portions, of which the last
 * is smaller.  Returns how many keys there were.
 */
static long
take_all(void)
{
	static dsa_pointer taken[PORTION];
	dsa_pointer list = InvalidDsaPointer;
	long		n = 0;
	int			portion;

	while ((portion = hash_take(partitions, taken, PORTION, &list)) > 0)
	{
		/* what was taken last is the first of the list */
		for (int i = portion - 1; i >= 0; i--)
		{
			if (taken[i] != list)
				fail("the list differs from what was taken", n + i);
			list = counter_at(list)->chain;
			space_free(taken[i]);
		}
		if (DsaPointerIsValid(list))
			fail("something else is on the list", n);
		n += portion;
	}
	return n;
}

/* A maker's table grows and shrinks, again and again. */
static void *
make_and_delete(void *arg)
{
	int			maker = (int) (intptr_t) arg;

	random_state += maker;
	for (int round = 0; round < ROUNDS; round++)
	{
		long		made = 0;
		long		deleted;

		for (int i = 0; i < KEYS; i++)
			made += find_or_make(maker, i);
		for (int i = 0; i < KEYS; i += 7)
			if (find_or_make(maker, i))
				fail("a key that was made is not found", i);
		if (made != KEYS)
			fail("keys made", made);
		deleted = delete_keys(maker);
		if (deleted != made)
			fail("keys deleted", deleted);
	}
	__atomic_fetch_sub(&working, 1, __ATOMIC_SEQ_CST);
	return NULL;
}

/*
 * Insert counters of one partition, as many at a time as can be, and find them.
 * What cannot be inserted in this way is made alone.  Returns how many were
 * inserted together.
 */
static int
insert_together(int maker, HashItem *items, const int *numbers, int n)
{
	int			ntogether = 0;

	for (int first = 0; first < n;)
	{
		LWLock	   *lock = hash_lock(partitions, items[first].key.hash, LW_EXCLUSIVE);
		int			ninserted = hash_insert_many(partitions, &items[first],
												 n - first, 0);

		LWLockRelease(lock);
		ntogether += ninserted;
		first += ninserted;
		if (first < n)
		{
			space_free(items[first].ref.self);
			(void) find_or_make(maker, numbers[first]);
			first++;
		}
	}

	if (n > 0)
	{
		HashItem	found[HASH_MANY];
		LWLock	   *lock;

		memcpy(found, items, n * sizeof(HashItem));
		lock = hash_lock(partitions, items[0].key.hash, LW_SHARED);
		hash_find_many(partitions, found, n, 0);
		LWLockRelease(lock);
		for (int i = 0; i < n; i++)
			if (found[i].ref.counter == NULL ||
				memcmp(found[i].ref.counter->key, items[i].key.data,
					   items[i].key.len) != 0)
				fail("a key that was inserted is not found", numbers[i]);
	}
	return ntogether;
}

/*
 * Make a maker's keys as they are loaded or published: partition by partition,
 * many at a time, into buckets that are reserved, as far as there was memory
 * for them.  Some are there already.
 */
static void *
load_and_delete(void *arg)
{
	int			maker = (int) (intptr_t) arg;
	long		together = 0;

	random_state += maker;
	for (int i = 0; i < LOADED; i += 50)
		(void) find_or_make(maker, i);
	for (int partition = 0; partition < HASH_PARTITIONS; partition++)
	{
		uint32		hash = (uint32) partition << (32 - HASH_PARTITION_BITS);
		HashSpare	spare = {0};
		HashItem	items[HASH_MANY];
		int			numbers[HASH_MANY];
		char		spaces[HASH_MANY][32];
		int			n = 0;

		hash_reserve(partitions, hash, LOADED / HASH_PARTITIONS, &spare);
		for (int i = 0; i < LOADED; i++)
		{
			make_key(maker, i, spaces[n], &items[n].key);
			if (hash_partition_number(items[n].key.hash) != partition)
				continue;
			items[n].ref = make_counter(&items[n].key);
			numbers[n++] = i;
			if (n == HASH_MANY)
			{
				together += insert_together(maker, items, numbers, n);
				n = 0;
			}
		}
		together += insert_together(maker, items, numbers, n);
	}
	if (together == 0)
		fail("keys inserted together", together);
	for (int i = 0; i < LOADED; i++)
		if (find_or_make(maker, i))
			fail("a key that was loaded is not found", i);
	if (delete_keys(maker) != LOADED)
		fail("loaded keys deleted", maker);
	return NULL;
}

/* Note a counter that a scan has returned, if its key is a stable one. */
static void
note_stable(const SharedCounter *counter, unsigned char *seen)
{
	char		number[16] = {0};

	if (counter->key[0] != '9')
		return;
	memcpy(number, counter->key + 2, counter->keylen - 2);
	if (seen[atoi(number)]++)
		fail("a key is returned twice", atoi(number));
}

static void
check_seen(const unsigned char *seen)
{
	for (int i = 0; i < STABLE_KEYS; i++)
		if (!seen[i])
			fail("a key is not returned", i);
}

/* Every scan returns each stable key once, whatever happens meanwhile. */
static void *
scan_all(void *arg)
{
	unsigned char *seen = calloc(STABLE_KEYS, 1);

	random_state += 100 + (int) (intptr_t) arg;
	do
	{
		HashScan	scan;
		CounterRef	ref;

		memset(seen, 0, STABLE_KEYS);
		hash_begin_scan(&scan, partitions, LW_SHARED);
		for (;;)
		{
			uint64		before = hash_scan_position(&scan);
			uint64		first = PG_UINT64_MAX;
			uint64		last = 0;

			if (!hash_begin_portion(&scan))
				break;
			while ((ref = hash_next(&scan)).counter != NULL)
			{
				uint64		position = hash_position(key_hash(ref.counter->key,
															  ref.counter->keylen));

				first = Min(first, position);
				last = Max(last, position);
				note_stable(ref.counter, seen);
			}
			if (first < before)
				fail("a key is before the scan's position", first);
			if (last >= hash_scan_position(&scan))
				fail("a key is not before the scan's next position", last);

			/* give the others time to change what is between two portions */
			if (next_random() % 8 == 0)
				usleep(next_random() % 1000);
		}
		check_seen(seen);
		__atomic_fetch_add(&scans, 1, __ATOMIC_RELAXED);
	} while (__atomic_load_n(&working, __ATOMIC_SEQ_CST) > 0);
	free(seen);
	return NULL;
}

/*
 * The other place becomes the present one.  The server reads which one it is by
 * atomic operations, which the sanitizer does not know as such.
 */
static void
change_places(void)
{
	pthread_rwlock_wrlock(&no_change);
	__atomic_store_n(&present, !present, __ATOMIC_RELAXED);
	pg_atomic_write_u32(&control.spaces.current, present);
	pthread_rwlock_unlock(&no_change);
}

/*
 * Move the stable keys, which only this thread could free, and the buckets to the
 * place that is the present one.  Returns how many keys were moved.
 */
static long
move_stable(void)
{
	CounterRef	refs[MOVED];
	HashScan	scan;
	CounterRef	ref;
	long		n = 0;

	hash_begin_scan(&scan, partitions, LW_SHARED);
	while (hash_begin_portion(&scan))
	{
		int			nrefs = 0;

		while ((ref = hash_next(&scan)).counter != NULL)
			if (ref.counter->key[0] == '9' && space_is_old(ref.self))
			{
				if (nrefs == MOVED)
					fail("counters of a portion", nrefs);
				refs[nrefs++] = ref;
			}
		for (int i = 0; i < nrefs; i++)
		{
			Size		size = offsetof(SharedCounter, key) + refs[i].counter->keylen;

			ref.self = allocate(size);
			ref.counter = counter_at(ref.self);
			if (!hash_move(partitions, refs[i], ref, size, false, &nmoved))
				fail("a counter is not moved", i);
			space_free(refs[i].self);
			n++;
		}
	}
	for (int i = 0; i < HASH_PARTITIONS; i++)
	{
		dsa_pointer held = InvalidDsaPointer;

		while (!hash_move_buckets(partitions, i, &held))
			;
	}
	return n;
}

/* Everything moves from one place to the other, again and again. */
static long moves = 0;

static void *
move_all(void *arg)
{
	random_state += 300;
	do
	{
		long		moved;

		change_places();
		moved = move_stable();
		if (moved != STABLE_KEYS)
			fail("keys moved", moved);
		moves++;
		usleep(1000);
	} while (__atomic_load_n(&working, __ATOMIC_SEQ_CST) > 0);
	return NULL;
}

/* A counter that is pinned, or linked though that is not expected, stays. */
static void
check_kept(uint32 pins, bool linked, bool is_moved)
{
	char		space[32];
	KeyBytes	key;
	CounterRef	ref;
	CounterRef	copy;
	Size		size;

	make_key(9, 0, space, &key);
	size = offsetof(SharedCounter, key) + key.len;
	ref = hash_find(partitions, &key, 0);
	copy.self = allocate(size);
	copy.counter = counter_at(copy.self);
	pg_atomic_write_u32(&ref.counter->pins, pins);
	if (hash_move(partitions, ref, copy, size, linked, &nmoved) != is_moved)
		fail("pins with which a counter moves or not", pins);
	if (hash_find(partitions, &key, 0).self != (is_moved ? copy.self : ref.self))
		fail("what is found then", pins);
	pg_atomic_write_u32(&hash_find(partitions, &key, 0).counter->pins, 0);
	space_free(is_moved ? ref.self : copy.self);
}

/* After a move nothing is where it was before, and everything is found. */
static void
check_moved(void)
{
	HashScan	scan;
	CounterRef	ref;

	for (int i = 0; i < 2; i++)
	{
		long		moved;

		change_places();
		moved = move_stable();
		if (moved != STABLE_KEYS)
			fail("keys moved", moved);
		hash_begin_scan(&scan, partitions, LW_SHARED);
		while (hash_begin_portion(&scan))
			while ((ref = hash_next(&scan)).counter != NULL)
				if (ref.counter->key[0] == '9' && space_is_old(ref.self))
					fail("a counter is in the old place", i);
		for (int p = 0; p < HASH_PARTITIONS; p++)
			if (DsaPointerIsValid(partitions[p].root) &&
				space_is_old(partitions[p].root))
				fail("buckets are in the old place", p);
		for (int n = 0; n < STABLE_KEYS; n++)
			if (find_or_make(9, n))
				fail("a key that was moved is not found", n);
	}
	check_kept(1, false, false);
	check_kept(COUNTER_LINKED, false, false);
	check_kept(COUNTER_LINKED + 1, true, false);
	check_kept(0, true, false);
	check_kept(COUNTER_LINKED | COUNTER_DRAIN, true, true);
	check_kept(COUNTER_SUSPECT, false, true);
}

/* A table has about as many buckets as keys, or up to twice as many. */
static void
check_sizes(void)
{
	for (int i = 0; i < HASH_PARTITIONS; i++)
	{
		uint32		nkeys = partitions[i].nkeys;
		uint32		nbuckets = partitions[i].nbuckets;

		/* the growth after an allocation was refused comes a few keys later */
		if (nkeys > nbuckets + 32)
			fail("too few buckets", nbuckets);
		if (nbuckets > HASH_FIRST_BUCKETS && nbuckets > 2 * nkeys + 1)
			fail("too many buckets", nbuckets);
	}
}

/*
 * Scan, and change the table after a number of portions: with `grow' it grows
 * then, otherwise it shrinks.  Each stable key is still returned once.
 */
static void
scan_across(int portions, bool grow)
{
	static unsigned char seen[STABLE_KEYS];
	HashScan	scan;
	CounterRef	ref;

	memset(seen, 0, STABLE_KEYS);
	for (int i = 0; !grow && i < 3 * KEYS; i++)
		(void) find_or_make(6, i);
	hash_begin_scan(&scan, partitions, LW_SHARED);
	for (int n = 0; hash_begin_portion(&scan); n++)
	{
		while ((ref = hash_next(&scan)).counter != NULL)
			note_stable(ref.counter, seen);
		if (n != portions)
			continue;
		if (!grow)
			(void) delete_keys(6);
		for (int i = 0; grow && i < 3 * KEYS; i++)
			(void) find_or_make(6, i);
	}
	check_seen(seen);
	(void) delete_keys(6);
}

/* Two threads make the same keys: each key is made once. */
static long shared_made = 0;

static void *
make_shared(void *arg)
{
	long		made = 0;

	random_state += 200 + (int) (intptr_t) arg;
	for (int i = 0; i < KEYS; i++)
		made += find_or_make(8, i);
	__atomic_fetch_add(&shared_made, made, __ATOMIC_RELAXED);
	return NULL;
}

int
main(int argc, char **argv)
{
	pthread_t	threads[MAKERS + SCANNERS + 4];
	int			n = 0;
	long		blocks_before;

	random_state = argc > 1 ? atoi(argv[1]) : 1;
	hash_init(partitions, TRANCHE);
	for (int i = 0; i < STABLE_KEYS; i++)
		if (!find_or_make(9, i))
			fail("a key is there before it was made", i);
	blocks_before = blocks;

	for (int i = 0; i < MAKERS; i++)
		pthread_create(&threads[n++], NULL, make_and_delete, (void *) (intptr_t) i);
	for (int i = 0; i < SCANNERS; i++)
		pthread_create(&threads[n++], NULL, scan_all, (void *) (intptr_t) i);
	pthread_create(&threads[n++], NULL, load_and_delete, (void *) (intptr_t) 5);
	for (int i = 0; i < 2; i++)
		pthread_create(&threads[n++], NULL, make_shared, (void *) (intptr_t) i);
	pthread_create(&threads[n++], NULL, move_all, NULL);
	for (int i = 0; i < n; i++)
		pthread_join(threads[i], NULL);

	if (shared_made != KEYS)
		fail("keys that two threads made", shared_made);
	check_moved();
	for (int portions = 0; portions < PAUSES; portions++)
	{
		scan_across(portions, true);
		scan_across(portions, false);
	}
	for (int i = 0; i < LARGE; i++)
		(void) find_or_make(7, i);
	check_sizes();
	if (delete_keys(7) != LARGE)
		fail("keys of a large table", LARGE);
	check_sizes();
	if (delete_keys(8) != KEYS)
		fail("keys that two threads made and that were deleted", KEYS);
	check_sizes();
	printf("blocks: %ld for %d keys, %ld before\n", blocks, STABLE_KEYS, blocks_before);
	for (int i = 0; i < LARGE; i++)
		(void) find_or_make(7, i);
	if (take_all() != LARGE + STABLE_KEYS)
		fail("keys of a table that is removed", LARGE);
	hash_free_buckets(partitions);
	if (blocks != 0)
		fail("blocks that are not freed", blocks);
	if (refusals == 0)
		fail("allocations that were refused", refusals);
	printf("passed: %ld scans, %ld moves, %u refusals\n", scans, moves, refusals);
	return 0;
}
