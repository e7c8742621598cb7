/*-------------------------------------------------------------------------
 *
 * hashtable.c
 *	  A concurrent hash table of counters, which grows and shrinks in steps.
 *
 * core's dshash doubles the whole table at once, under all of its locks, and
 * needs an entry of its own for each counter.  Here each partition grows by
 * itself, a bucket at a time, and counters are chained to each other.
 *
 * This file knows only what a counter needs to be found: its chain and its
 * key.  It calls nothing but space.c, LWLocks and key_hash(), so that it can be
 * tested with threads: see t/threads.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "hashtable.h"
#include "port/pg_bitutils.h"
#include "port/pg_bswap.h"

/*
 * Buckets in a chunk.  The first chunks of a partition are small, because most
 * tables are.  The others are as large as keeps the directory small: dsa.c does
 * not return a segment to the system when what is freed last in it is larger
 * than 8 kB.  A directory reaches that with 67 million keys.
 */
#define SMALL_CHUNK			64
#define SMALL_CHUNKS		8
#define LARGE_CHUNK			(SMALL_CHUNK * SMALL_CHUNKS)

/* The chunks of a partition that has more than one. */
typedef struct HashDirectory
{
	uint64		size;			/* a power of 2 minus 1 */
	dsa_pointer chunks[FLEXIBLE_ARRAY_MEMBER];
} HashDirectory;

#define DIRECTORY_MIN		7
#define DIRECTORY_SIZE(size) \
	(offsetof(HashDirectory, chunks) + (size) * sizeof(dsa_pointer))

/* a portion of a scan ends after this many counters and buckets */
#define PORTION_STEPS		256

/*
 * The heads of buckets and the counters are all over the memory, and to wait for
 * each would take most of a scan's time.  So a scan looks this many buckets ahead
 * and has the head fetched into the cache, a few buckets later the first counter,
 * and again a few later the second.
 */
#define SCAN_AHEAD			HASH_SCAN_AHEAD
#define SCAN_TO_FIRST		(SCAN_AHEAD * 3 / 8)
#define SCAN_TO_SECOND		(SCAN_AHEAD * 6 / 8)

StaticAssertDecl((SCAN_AHEAD & (SCAN_AHEAD - 1)) == 0,
				 "positions in the ring must be cheap to compute");

/* shrink if there are more than this many buckets for a key */
#define SHRINK_FACTOR		2

static void remove_chunk(HashPartition *partition);

/* ------------------------------------------------------------------------
 * Buckets
 * ------------------------------------------------------------------------
 */

/* The largest power of 2 that is not greater than the number of buckets. */
static inline uint32
lower_power(uint32 nbuckets)
{
	return (uint32) 1 << pg_leftmost_one_pos32(nbuckets);
}

/* The number of the bucket for a hash. */
static inline uint32
bucket_number(const HashPartition *partition, uint32 hash)
{
	uint32		power = lower_power(partition->nbuckets);
	uint32		number = hash & (2 * power - 1);

	/* a bucket that is not there yet: its keys are still in the other half */
	return number < partition->nbuckets ? number : number & (power - 1);
}

/* The partition of a hash. */
static inline HashPartition *
partition_of(HashPartition *partitions, uint32 hash)
{
	return &partitions[hash_partition_number(hash)];
}

/* In which chunk is a bucket that is not one of the first? */
static inline uint32
chunk_number(uint32 bucket)
{
	uint32		n = bucket - HASH_FIRST_BUCKETS;

	return n < LARGE_CHUNK ? n / SMALL_CHUNK :
		SMALL_CHUNKS - 1 + n / LARGE_CHUNK;
}

/* Where in the chunk is it? */
static inline uint32
chunk_offset(uint32 bucket)
{
	uint32		n = bucket - HASH_FIRST_BUCKETS;

	return n % (n < LARGE_CHUNK ? SMALL_CHUNK : LARGE_CHUNK);
}

static inline bool
begins_chunk(uint32 bucket)
{
	return bucket >= HASH_FIRST_BUCKETS && chunk_offset(bucket) == 0;
}

/* How many buckets has a chunk? */
static inline uint32
chunk_size(uint32 number)
{
	return number < SMALL_CHUNKS ? SMALL_CHUNK : LARGE_CHUNK;
}

/*
 * Get the head of a bucket.  `root' is the address of the partition's root; NULL:
 * it has none.  The partition is locked.
 */
static inline dsa_pointer *
bucket_below(HashPartition *partition, void *root, uint32 bucket)
{
	dsa_pointer *chunk = root;

	if (bucket < HASH_FIRST_BUCKETS)
		return &partition->buckets[bucket];
	if (chunk_number(partition->nbuckets - 1) > 0)
		chunk = space_address(((HashDirectory *) root)->chunks[chunk_number(bucket)]);
	return &chunk[chunk_offset(bucket)];
}

/* The same, where that address is not known. */
static inline dsa_pointer *
bucket_head(HashPartition *partition, uint32 bucket)
{
	if (bucket < HASH_FIRST_BUCKETS)
		return &partition->buckets[bucket];
	return bucket_below(partition,
						space_address(partition->root), bucket);
}

/* The hash of a counter's key. */
static inline uint32
counter_hash(const SharedCounter *counter)
{
	return key_hash(counter->key, counter->keylen);
}

/* ------------------------------------------------------------------------
 * Making
 * ------------------------------------------------------------------------
 */

/* Initialize the partitions of an empty table.  Cannot fail. */
void
hash_init(HashPartition *partitions, int tranche)
{
	for (int i = 0; i < HASH_PARTITIONS; i++)
	{
		HashPartition *partition = &partitions[i];

		LWLockInitialize(&partition->lock, tranche);
		partition->nkeys = 0;
		partition->nbuckets = HASH_FIRST_BUCKETS;
		partition->root = InvalidDsaPointer;
		for (int b = 0; b < HASH_FIRST_BUCKETS; b++)
			partition->buckets[b] = InvalidDsaPointer;
	}
}

/*
 * Free what an empty table has allocated, from its end, so that another call can
 * go on after an error.  No other process uses it any more.
 */
void
hash_free_buckets(HashPartition *partitions)
{
	for (int i = 0; i < HASH_PARTITIONS; i++)
	{
		HashPartition *partition = &partitions[i];

		Assert(partition->nkeys == 0);
		while (partition->nbuckets > HASH_FIRST_BUCKETS)
		{
			uint32		last = partition->nbuckets - 1;

			(void) space_address(partition->root);
			partition->nbuckets = last - chunk_offset(last);
			remove_chunk(partition);
		}
	}
}

/* ------------------------------------------------------------------------
 * Finding
 * ------------------------------------------------------------------------
 */

/* Lock the partition of a hash.  Returns the lock, for LWLockRelease(). */
LWLock *
hash_lock(HashPartition *partitions, uint32 hash, LWLockMode mode)
{
	LWLock	   *lock = &partition_of(partitions, hash)->lock;

	LWLockAcquire(lock, mode);
	return lock;
}

/* Find a key in the chain that begins with `first'. */
static inline CounterRef
find_in_chain(dsa_pointer first, const KeyBytes *key, uint8 shape)
{
	CounterRef	ref = {NULL, first};

	for (;;)
	{
		ref.counter = counter_at(ref.self);
		if (ref.counter == NULL ||
			(ref.counter->keylen == key->len && ref.counter->shape == shape &&
			 memcmp(ref.counter->key, key->data, KEY_LENGTH(key->len)) == 0))
			return ref;
		ref.self = ref.counter->chain;
	}
}

/*
 * Find a key.  Returns a counter with a NULL pointer if it is not there.  The
 * partition is locked.  Raises an error if memory cannot be mapped.
 */
CounterRef
hash_find(HashPartition *partitions, const KeyBytes *key, uint8 shape)
{
	HashPartition *partition = partition_of(partitions, key->hash);

	return find_in_chain(*bucket_head(partition,
									  bucket_number(partition, key->hash)),
						 key, shape);
}

/*
 * Find the heads of the buckets of keys, up to HASH_MANY, and have the
 * counters that they lead to fetched: to wait for each would take longer than
 * all the rest.
 */
static void
find_heads(HashPartition *partition, const HashItem *items, int n,
		   dsa_pointer **heads)
{
	void	   *root = space_address(partition->root);

	Assert(n <= HASH_MANY);
	for (int i = 0; i < n; i++)
	{
		Assert(hash_partition_number(items[i].key.hash) ==
			   hash_partition_number(items[0].key.hash));
		heads[i] = bucket_below(partition, root,
								bucket_number(partition, items[i].key.hash));
		compat_prefetch(heads[i]);
	}
	for (int i = 0; i < n; i++)
		counter_prefetch(*heads[i]);
}

/*
 * Find keys of one partition, up to HASH_MANY: like hash_find() for each.
 */
void
hash_find_many(HashPartition *partitions, HashItem *items, int n, uint8 shape)
{
	dsa_pointer *heads[HASH_MANY];

	find_heads(partition_of(partitions, items[0].key.hash), items, n, heads);
	for (int i = 0; i < n; i++)
		items[i].ref = find_in_chain(*heads[i], &items[i].key, shape);
}

/* ------------------------------------------------------------------------
 * Growing
 * ------------------------------------------------------------------------
 */

/* Note what one more bucket than there are will need, if there is to be one. */
static void
plan(uint32 nbuckets, bool grows, HashSpare *spare)
{
	memset(spare, 0, sizeof(HashSpare));
	if (unlikely(grows && begins_chunk(nbuckets)))
	{
		uint32		c = chunk_number(nbuckets);

		spare->chunk_size = chunk_size(c);

		/* if there are as many chunks, the directory may be full */
		if (c == 1)
			spare->directory_size = DIRECTORY_MIN;
		else if (c >= DIRECTORY_MIN && (c & (c + 1)) == 0)
			spare->directory_size = 2 * (uint64) c + 1;
	}
}

/*
 * Note what a new key of this hash will need.  The partition is locked.
 * Cannot fail.
 */
void
hash_plan(const HashPartition *partitions, uint32 hash, HashSpare *spare)
{
	const HashPartition *partition = &partitions[hash_partition_number(hash)];

	plan(partition->nbuckets, partition->nkeys >= partition->nbuckets, spare);
}

/*
 * Allocate what was planned.  Nothing is locked.  If memory is out, the
 * partition does without.  May raise other errors.
 */
void
hash_prepare(HashSpare *spare)
{
	if (likely(spare->chunk_size == 0))
		return;
	spare->chunk = space_try_allocate(spare->chunk_size * sizeof(dsa_pointer),
									  DSA_ALLOC_ZERO);
	if (spare->directory_size == 0)
		return;
	spare->directory = space_try_allocate(DIRECTORY_SIZE(spare->directory_size),
										  DSA_ALLOC_HUGE);
	if (DsaPointerIsValid(spare->directory))
		((HashDirectory *) space_address(spare->directory))->size = spare->directory_size;
}

/* Free what was prepared and not used, and what was replaced by it. */
void
hash_free_spare(HashSpare *spare)
{
	dsa_pointer chunk = spare->chunk;
	dsa_pointer directory = spare->directory;

	spare->chunk = spare->directory = InvalidDsaPointer;
	if (DsaPointerIsValid(chunk))
		space_free(chunk);
	if (DsaPointerIsValid(directory))
		space_free(directory);
}

/*
 * Make room for one more bucket, which begins a chunk.  Returns false if that
 * needs memory that was not prepared.  What is no longer needed takes the place
 * in `spare' of what was used.  What leads to the bucket is mapped.
 */
static bool
add_chunk(HashPartition *partition, HashSpare *spare)
{
	uint32		c = chunk_number(partition->nbuckets);
	dsa_pointer chunk = spare->chunk;
	HashDirectory *directory = NULL;

	if (!DsaPointerIsValid(chunk) || spare->chunk_size != chunk_size(c))
		return false;

	/* map what is about to be used: later nothing may fail */
	(void) space_address(chunk);
	if (c == 0)
		partition->root = chunk;
	else
	{
		if (c > 1)
			directory = space_address(partition->root);
		if (c == 1 || directory->size == c)
		{
			HashDirectory *larger = space_address(spare->directory);

			if (larger == NULL || larger->size <= c)
				return false;
			if (c == 1)
			{
				larger->chunks[0] = partition->root;
				partition->root = spare->directory;
				spare->directory = InvalidDsaPointer;
			}
			else
			{
				dsa_pointer old = partition->root;

				memcpy(larger->chunks, directory->chunks,
					   c * sizeof(dsa_pointer));
				partition->root = spare->directory;
				spare->directory = old;
			}
			directory = larger;
		}
		directory->chunks[c] = chunk;
	}
	spare->chunk = InvalidDsaPointer;
	return true;
}

/* Map the counters of a chain, so that going along it cannot fail. */
static void
map_chain(dsa_pointer pointer)
{
	while (DsaPointerIsValid(pointer))
		pointer = counter_at(pointer)->chain;
}

/*
 * Split the bucket whose turn it is.  Returns false if that needs memory that
 * was not prepared.  On error nothing has changed.
 */
static bool
split(HashPartition *partition, HashSpare *spare)
{
	uint32		number = partition->nbuckets;
	dsa_pointer *old_link = bucket_head(partition, number - lower_power(number));
	dsa_pointer *new_link;

	if (number == PG_UINT32_MAX / 2)
		return false;

	/* map all that is to be changed; a bucket stays where it is */
	map_chain(*old_link);
	if (begins_chunk(number))
	{
		dsa_pointer chunk = spare->chunk;

		if (!add_chunk(partition, spare))
			return false;
		new_link = space_address(chunk);
	}
	else
		new_link = bucket_head(partition, number);

	/* from here on nothing can fail */
	partition->nbuckets++;
	for (dsa_pointer pointer = *old_link; DsaPointerIsValid(pointer);)
	{
		SharedCounter *counter = counter_at(pointer);
		dsa_pointer next = counter->chain;

		if (bucket_number(partition, counter_hash(counter)) == number)
		{
			*new_link = pointer;
			new_link = &counter->chain;
		}
		else
		{
			*old_link = pointer;
			old_link = &counter->chain;
		}
		pointer = next;
	}
	*old_link = InvalidDsaPointer;
	*new_link = InvalidDsaPointer;
	return true;
}

/* Put a counter into a bucket. */
static inline void
insert(HashPartition *partition, dsa_pointer *head, CounterRef ref)
{
	Assert(LWLockHeldByMeInMode(&partition->lock, LW_EXCLUSIVE));
	ref.counter->chain = *head;
	*head = ref.self;
	partition->nkeys++;
}

/*
 * Insert a counter, which has a key that is not there.  If the partition has as
 * many keys as buckets, it grows.  The partition is locked exclusively, `spare'
 * was prepared for the same hash.  On error nothing is inserted.
 */
void
hash_insert(HashPartition *partitions, uint32 hash, CounterRef ref,
			HashSpare *spare)
{
	HashPartition *partition = partition_of(partitions, hash);

	if (partition->nkeys >= partition->nbuckets)
		(void) split(partition, spare);
	insert(partition, bucket_head(partition, bucket_number(partition, hash)),
		   ref);
}

/*
 * Make buckets for so many new keys in the partition of a hash, so that
 * hash_insert_many() can insert them.  If memory is out, makes fewer.
 * `spare' is zero; on error the caller frees it.  Nothing is locked.
 *
 * The lock is only held for the buckets of one chunk at a time, so that nobody
 * waits for long.
 */
void
hash_reserve(HashPartition *partitions, uint32 hash, uint32 nkeys,
			 HashSpare *spare)
{
	HashPartition *partition = partition_of(partitions, hash);
	uint32		nbuckets;
	bool		enough;

	for (;;)
	{
		LWLockAcquire(&partition->lock, LW_EXCLUSIVE);
		do
			enough = partition->nbuckets >= (uint64) partition->nkeys + nkeys;
		while (!enough && split(partition, spare));
		nbuckets = partition->nbuckets;
		LWLockRelease(&partition->lock);

		hash_free_spare(spare);
		plan(nbuckets, !enough, spare);
		hash_prepare(spare);
		if (!DsaPointerIsValid(spare->chunk) ||
			(spare->directory_size > 0 && !DsaPointerIsValid(spare->directory)))
			break;
	}
	hash_free_spare(spare);
}

/*
 * Insert counters of one partition, up to HASH_MANY, with different keys: those
 * before the first one whose key is there, or for which there is no bucket in
 * reserve.  Returns how many.  The partition is locked exclusively.
 *
 * Raises an error if memory cannot be mapped; then none is inserted.
 */
int
hash_insert_many(HashPartition *partitions, const HashItem *items, int n,
				 uint8 shape)
{
	HashPartition *partition = partition_of(partitions, items[0].key.hash);
	dsa_pointer *heads[HASH_MANY];
	int			ninserted = 0;

	n = Min(n, partition->nbuckets - Min(partition->nkeys, partition->nbuckets));
	find_heads(partition, items, n, heads);
	while (ninserted < n &&
		   find_in_chain(*heads[ninserted], &items[ninserted].key,
						 shape).counter == NULL)
		ninserted++;

	/* from here on nothing can fail */
	for (int i = 0; i < ninserted; i++)
		insert(partition, heads[i], items[i].ref);
	return ninserted;
}

/* ------------------------------------------------------------------------
 * Shrinking
 * ------------------------------------------------------------------------
 */

/* Free the chunk that began with the bucket which was just removed. */
static void
remove_chunk(HashPartition *partition)
{
	uint32		c = chunk_number(partition->nbuckets);
	HashDirectory *directory;
	dsa_pointer chunk = partition->root;
	dsa_pointer old_directory = InvalidDsaPointer;

	if (c == 0)
		partition->root = InvalidDsaPointer;
	else
	{
		directory = space_address(partition->root);
		chunk = directory->chunks[c];
		if (c == 1)
		{
			old_directory = partition->root;
			partition->root = directory->chunks[0];
		}
	}
	space_free(chunk);
	if (DsaPointerIsValid(old_directory))
		space_free(old_directory);
}

/*
 * Join the last bucket with the one that it was split from, as long as there
 * are too many.  The partition is locked exclusively.
 */
static void
shrink(HashPartition *partition)
{
	while (partition->nbuckets > HASH_FIRST_BUCKETS &&
		   partition->nbuckets / SHRINK_FACTOR > partition->nkeys)
	{
		uint32		last = partition->nbuckets - 1;
		dsa_pointer *last_head = bucket_head(partition, last);
		dsa_pointer *link = bucket_head(partition, last - lower_power(last));

		map_chain(*last_head);
		while (DsaPointerIsValid(*link))
			link = &counter_at(*link)->chain;
		*link = *last_head;
		partition->nbuckets--;
		if (begins_chunk(last))
			remove_chunk(partition);
	}
}

/* ------------------------------------------------------------------------
 * Clearing
 * ------------------------------------------------------------------------
 */

/*
 * Get the head of a bucket that is not empty, of a partition that is not: the
 * last bucket, after those behind it were removed.
 */
static dsa_pointer *
last_used_bucket(HashPartition *partition)
{
	for (;;)
	{
		uint32		last = partition->nbuckets - 1;
		dsa_pointer *head = bucket_head(partition, last);

		if (DsaPointerIsValid(*head))
			return head;
		if (last < HASH_FIRST_BUCKETS)
			break;
		partition->nbuckets--;
		if (begins_chunk(last))
			remove_chunk(partition);
	}
	for (int b = 0; b < HASH_FIRST_BUCKETS; b++)
		if (DsaPointerIsValid(partition->buckets[b]))
			return &partition->buckets[b];
	pg_unreachable();
}

/* Move a counter from a partition, which has one, to a list. */
static dsa_pointer
take_counter(HashPartition *partition, dsa_pointer *list)
{
	dsa_pointer *head = last_used_bucket(partition);
	dsa_pointer self = *head;
	SharedCounter *counter = counter_at(self);

	*head = counter->chain;
	counter->chain = *list;
	*list = self;
	partition->nkeys--;
	return self;
}

/*
 * Empty a table that no other process uses any more.  Moves counters to a list
 * through their chains, and notes them in `taken', up to `max' of them.  Returns
 * how many; 0: the table is empty.
 *
 * What has grown is removed with the counters, from its end, so the table is
 * valid at any time.  On error, what was moved is on the list.
 */
int
hash_take(HashPartition *partitions, dsa_pointer *taken, int max,
		  dsa_pointer *list)
{
	int			n = 0;

	for (int i = 0; i < HASH_PARTITIONS && n < max; i++)
	{
		HashPartition *partition = &partitions[i];

		if (partition->nkeys == 0)
			continue;
		LWLockAcquire(&partition->lock, LW_EXCLUSIVE);
		while (partition->nkeys > 0 && n < max)
			taken[n++] = take_counter(partition, list);
		shrink(partition);
		LWLockRelease(&partition->lock);
	}
	return n;
}

/* ------------------------------------------------------------------------
 * Moving
 * ------------------------------------------------------------------------
 */

/*
 * Have the table lead to a copy of a counter, which this makes.  Returns false,
 * and changes nothing, if the counter is pinned, or is not `linked' as the
 * caller says.
 *
 * Under the lock of the partition nobody but who has a pin changes a counter, so
 * without pins the copy is like the counter.  The copy takes its place in the
 * chain, so scans return one of them and not both.  `nmoved' is increased under
 * the lock.  On error nothing has changed.
 */
bool
hash_move(HashPartition *partitions, CounterRef ref, CounterRef copy,
		  Size size, bool linked, pg_atomic_uint64 *nmoved)
{
	uint32		hash = counter_hash(ref.counter);
	HashPartition *partition = partition_of(partitions, hash);
	dsa_pointer *link;
	bool		moves;

	LWLockAcquire(&partition->lock, LW_EXCLUSIVE);
	link = bucket_head(partition, bucket_number(partition, hash));
	while (*link != ref.self)
		link = &counter_at(*link)->chain;
	moves = (pg_atomic_read_u32(&ref.counter->pins) &
			 (COUNTER_PINS | COUNTER_LINKED)) == (linked ? COUNTER_LINKED : 0);
	if (moves)
	{
		/* what those with pins have done is seen; releasing one is a barrier */
		pg_read_barrier();
		memcpy(copy.counter, ref.counter, size);
		*link = copy.self;
		pg_atomic_fetch_add_u64(nmoved, 1);
	}
	LWLockRelease(&partition->lock);
	return moves;
}

/*
 * Find the pointer to something of a partition that is in the old space, and its
 * size.  Returns NULL if there is nothing.  The partition is locked.
 */
static dsa_pointer *
find_old(HashPartition *partition, Size *size)
{
	HashDirectory *directory;
	uint32		nchunks;

	if (partition->nbuckets == HASH_FIRST_BUCKETS)
		return NULL;
	nchunks = chunk_number(partition->nbuckets - 1) + 1;
	directory = space_address(partition->root);
	if (space_is_old(partition->root))
	{
		*size = nchunks == 1 ? chunk_size(0) * sizeof(dsa_pointer) :
			DIRECTORY_SIZE(directory->size);
		return &partition->root;
	}
	for (uint32 c = 0; nchunks > 1 && c < nchunks; c++)
	{
		if (!space_is_old(directory->chunks[c]))
			continue;
		*size = chunk_size(c) * sizeof(dsa_pointer);
		return &directory->chunks[c];
	}
	return NULL;
}

/*
 * Move what a partition has grown by to the present space.  Returns false if
 * there is no memory.  Nothing is locked.  On error, the caller frees what is in
 * `held', if that is not InvalidDsaPointer.
 */
bool
hash_move_buckets(HashPartition *partitions, int number, dsa_pointer *held)
{
	HashPartition *partition = &partitions[number];

	for (;;)
	{
		Size		planned;
		Size		size = 0;
		dsa_pointer unused;
		dsa_pointer *link;

		LWLockAcquire(&partition->lock, LW_SHARED);
		link = find_old(partition, &planned);
		LWLockRelease(&partition->lock);
		if (link == NULL)
			return true;

		*held = space_try_allocate(planned, DSA_ALLOC_HUGE);
		if (!DsaPointerIsValid(*held))
			return false;
		(void) space_address(*held);

		/* the partition may have changed; then this goes on with the next */
		LWLockAcquire(&partition->lock, LW_EXCLUSIVE);
		link = find_old(partition, &size);
		if (link != NULL && size == planned)
		{
			dsa_pointer old = *link;

			memcpy(space_address(*held), space_address(old), size);
			*link = *held;
			*held = old;
		}
		LWLockRelease(&partition->lock);
		unused = *held;
		*held = InvalidDsaPointer;
		space_free(unused);
	}
}

/* ------------------------------------------------------------------------
 * Scanning
 * ------------------------------------------------------------------------
 */

/* Reverse the order of the bits. */
static inline uint32
reverse_bits(uint32 x)
{
	x = ((x >> 1) & 0x55555555) | ((x & 0x55555555) << 1);
	x = ((x >> 2) & 0x33333333) | ((x & 0x33333333) << 2);
	x = ((x >> 4) & 0x0F0F0F0F) | ((x & 0x0F0F0F0F) << 4);
	return pg_bswap32(x);
}

/* Where scans come by a key of this hash: see hash_scan_position(). */
uint64
hash_position(uint32 hash)
{
	return (uint64) hash_partition_number(hash) << 32 | reverse_bits(hash);
}

/*
 * Get the position of a scan that is between two portions: it has returned the
 * counters whose hashes have lower positions, and no others.
 */
uint64
hash_scan_position(const HashScan *scan)
{
	Assert(!scan->locked);
	return ((uint64) scan->partition << 32) + scan->position;
}

/* Begin a scan.  Nothing is locked yet. */
void
hash_begin_scan(HashScan *scan, HashPartition *partitions, LWLockMode mode)
{
	memset(scan, 0, sizeof(HashScan));
	scan->partitions = partitions;
	scan->mode = mode;
}

/*
 * Begin the next portion, and lock its partition.  Returns false, without a
 * lock, if there is none.
 */
bool
hash_begin_portion(HashScan *scan)
{
	Assert(!scan->locked && scan->link == NULL);
	if (scan->partition == HASH_PARTITIONS)
		return false;
	LWLockAcquire(&scan->partitions[scan->partition].lock, scan->mode);
	scan->locked = true;
	scan->steps = 0;
	scan->nentered = 0;
	scan->nahead = 0;
	scan->ahead_position = scan->position;
	return true;
}

/* The bucket that was put into the ring `n' buckets ago, or NULL. */
static inline HashScanBucket *
ahead_bucket(HashScan *scan, int n)
{
	return scan->nahead <= scan->nentered + n ? NULL :
		&scan->ahead[(scan->nahead - 1 - n) & (SCAN_AHEAD - 1)];
}

/*
 * Find the bucket after the last one that is in the ring, put it there, and
 * have it and those before it fetched.
 */
static void
look_ahead(HashScan *scan)
{
	HashPartition *partition = &scan->partitions[scan->partition];
	uint32		power = lower_power(partition->nbuckets);
	uint32		number = bucket_number(partition,
									   reverse_bits((uint32) scan->ahead_position));
	bool		is_split = number >= power || number + power < partition->nbuckets;

	/* the bucket's keys agree in so many of the lower bits of their hashes */
	int			bits = pg_leftmost_one_pos32(power) + is_split;
	HashScanBucket *bucket = &scan->ahead[scan->nahead++ & (SCAN_AHEAD - 1)];

	bucket->head = bucket_head(partition, number);
	bucket->begin = reverse_bits(number);
	bucket->end = bucket->begin + (UINT64CONST(1) << (32 - bits));
	scan->ahead_position = bucket->end;

	compat_prefetch(bucket->head);
	if ((bucket = ahead_bucket(scan, SCAN_TO_FIRST)) != NULL)
		counter_prefetch(*bucket->head);
	if ((bucket = ahead_bucket(scan, SCAN_TO_SECOND)) != NULL &&
		DsaPointerIsValid(*bucket->head))
		counter_prefetch(counter_at(*bucket->head)->chain);
}

/* Enter the bucket that has the scan's position. */
static void
enter_bucket(HashScan *scan)
{
	HashScanBucket *bucket;

	while (scan->nahead < scan->nentered + SCAN_AHEAD &&
		   scan->ahead_position <= PG_UINT32_MAX)
		look_ahead(scan);
	bucket = &scan->ahead[scan->nentered++ & (SCAN_AHEAD - 1)];
	scan->bucket_end = bucket->end;

	/* if buckets were joined meanwhile, some of its counters are done */
	scan->some_done = bucket->begin < scan->position;
	scan->link = bucket->head;
	scan->counter = NULL;
	scan->steps++;
}

/* Leave the bucket, and after the last one, the partition. */
static void
leave_bucket(HashScan *scan)
{
	scan->link = NULL;
	scan->position = scan->bucket_end;
	if (scan->position > PG_UINT32_MAX)
	{
		int			done = scan->partition;

		hash_end_portion(scan);
		scan->partition = done + 1;
		scan->position = 0;
	}
	else if (scan->steps >= PORTION_STEPS)
		hash_end_portion(scan);
}

/*
 * Get the next counter of the portion, which is locked until the next call.
 * At the end of the portion, returns one with a NULL pointer, and nothing is
 * locked.
 */
CounterRef
hash_next(HashScan *scan)
{
	CounterRef	ref = {NULL, InvalidDsaPointer};

	while (scan->locked)
	{
		if (scan->link == NULL)
			enter_bucket(scan);
		else if (scan->counter != NULL)
			scan->link = &scan->counter->chain;

		ref = counter_ref(*scan->link);
		scan->counter = ref.counter;
		if (ref.counter == NULL)
		{
			leave_bucket(scan);
			continue;
		}
		scan->steps++;
		if (likely(!scan->some_done) ||
			reverse_bits(counter_hash(ref.counter)) >= scan->position)
			break;
	}
	return ref;
}

/*
 * Remove the counter that hash_next() has just returned.  The scan's mode is
 * LW_EXCLUSIVE.  Cannot fail.
 */
void
hash_delete_current(HashScan *scan)
{
	Assert(scan->locked && scan->mode == LW_EXCLUSIVE);
	*scan->link = scan->counter->chain;
	scan->counter = NULL;
	scan->partitions[scan->partition].nkeys--;
}

/* End the portion, also in the middle of a bucket; then the scan is over. */
void
hash_end_portion(HashScan *scan)
{
	HashPartition *partition = &scan->partitions[scan->partition];

	if (!scan->locked)
		return;
	if (scan->link != NULL)
	{
		scan->link = NULL;
		scan->partition = HASH_PARTITIONS;
	}
	if (scan->mode == LW_EXCLUSIVE)
		shrink(partition);
	LWLockRelease(&partition->lock);
	scan->locked = false;
}
