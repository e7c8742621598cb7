#!/bin/bash
#
# A dynamic shared memory area (dsa.c) that is at its size limit leaks with each
# small allocation that fails, and does not shrink any more.
#
# Versions   15.20-0+deb12u1, 64 bit.  The same in 19rc1 (19~rc1-1), tried by
#            hand: every number.  The source read is 15.18's.
# Guess      What was allocated is freed, and what failed has allocated nothing. So
#            after dsa_trim() the area is as small as before.
# Behaviour  An object of up to 8 kB lies in a superblock of 16 pages, which has a
#            descriptor, a "span", of 56 bytes; 72 of these fill a page. When no
#            superblock of the size has room, ensure_active_superblock() takes a
#            span first and the 16 pages second. When it does not get the pages, from
#            get_best_segment() or make_new_segment(), it says so and forgets the
#            span. No superblock refers to it, so nothing ever frees it.
#            - Each dsa_allocate_extended() that fails so leaks one span, with
#              DSA_ALLOC_NO_OOM and, by the source, with an error, too.
#            - A page with a leaked span is never given back, nor is the segment
#              that the page is in. One failure in an area of 8 MB, and 3 MB stay,
#              where 1 MB stays without it. After 10,000 failures, or 1000 each of
#              three times that the area is full, all 8 MB stay, though nothing is
#              allocated. dsa_trim() passes by: these pages aren't empty.
#            - It ends when the pages that are too few for a superblock are used up:
#              then there is no page for a span either, and the failure is for free.
#              Objects of that size don't miss those pages; as many fit as before.
#            - Of objects over 8 kB, dsa_allocate_extended() takes the span itself,
#              and frees it when the pages can't be had: nothing is leaked. But with
#              or without a failure 6 MB stay: dsa_free() gives the pages of a large
#              object back to their segment, and never the segment to the system,
#              though dsa_trim() skips large objects on the ground that it does.
#            The limit is that of dsa_set_size_limit(); by the source, it's the same
#            when the system has no segment to give. Who has an area with a limit
#            should refuse before dsa.c does.
#
set -euo pipefail

# shellcheck source=findings/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

version=15.20-0+deb12u1
need bookworm
command -v gcc >/dev/null || die "this takes gcc"
get 15 "$version"
(cd debs && apt-get -q download "postgresql-server-dev-15=$version") >apt.log 2>&1 || {
	cat apt.log >&2
	die "the headers of version $version can't be had"
}
dpkg -x "$(echo debs/postgresql-server-dev-15_*.deb)" "$version"
chmod -R a+rX "$version"

# The area lives as long as the call.  A round takes objects, as many as asked for
# or as there are, then goes on in vain as often as asked for; frees all that it
# has; and trims the area.  It dumps the area to the server's log when it is full
# and when it is trimmed.
cat >area.c <<'C'
#include "postgres.h"

#include "catalog/pg_type.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "storage/lwlock.h"
#include "utils/array.h"
#include "utils/dsa.h"

PG_MODULE_MAGIC;
PG_FUNCTION_INFO_V1(rounds);

#define LIMIT	(8 * 1024 * 1024)
#define MOST	(LIMIT / 1000)

/* rounds(size of an object, objects, failures, rounds): objects in each */
Datum
rounds(PG_FUNCTION_ARGS)
{
	int			size = PG_GETARG_INT32(0);
	int			wanted = Min(PG_GETARG_INT32(1), MOST);
	int			failures = PG_GETARG_INT32(2);
	int			nrounds = PG_GETARG_INT32(3);
	dsa_pointer *objects = palloc(MOST * sizeof(dsa_pointer));
	Datum	   *counts = palloc(nrounds * sizeof(Datum));
	dsa_area   *area = dsa_create(LWTRANCHE_PARALLEL_QUERY_DSA);

	dsa_set_size_limit(area, LIMIT);
	for (int round = 0; round < nrounds; round++)
	{
		int			n = 0;
		int			failed = 0;

		while (n < wanted)
		{
			dsa_pointer object = dsa_allocate_extended(area, size, DSA_ALLOC_NO_OOM);

			if (DsaPointerIsValid(object))
				objects[n++] = object;
			else if (++failed >= failures)
				break;
			CHECK_FOR_INTERRUPTS();
		}
		counts[round] = Int32GetDatum(n);
		dsa_dump(area);
		while (n > 0)
			dsa_free(area, objects[--n]);
		dsa_trim(area);
		dsa_dump(area);
	}
	dsa_detach(area);
	PG_RETURN_ARRAYTYPE_P(construct_array(counts, nrounds, INT4OID, sizeof(int32), true, TYPALIGN_INT));
}
C
gcc -O2 -Wall -Werror -fPIC -shared -D_GNU_SOURCE -I "$version/usr/include/postgresql/15/server" -o area.so area.c >gcc.log 2>&1 || {
	cat gcc.log >&2
	die "the module can't be compiled"
}
chmod a+r area.so

make "$version" data
start "$version" data
problem=$(sql "$version" <<<"CREATE FUNCTION rounds(int, int, int, int) RETURNS int[] LANGUAGE c STRICT AS '$folder/area.so'")
[ -z "$problem" ] || die "$problem"

# rounds SIZE OBJECTS FAILURES ROUNDS: a line for each round, from the dumps.  After
# the trim there is no superblock of objects, so spans that are in use are leaked.
rounds() {
	local before counts
	before=$(wc -l <data.log)
	counts=$(sql "$version" <<<"SELECT unnest(rounds($1, $2, $3, $4))")
	paste -d ' ' <(printf '%s\n' "$counts") <(tail -n "+$((before + 1))" data.log | awk '
		function dumped() {
			if (dumps % 2)
				full = size
			else if (dumps)
				printf "objects, %.1f MB; freed and trimmed %.1f MB, %d spans\n", full / 1048576, size / 1048576, spans
			spans = 0
			dumps++
		}
		/^dsa_area handle/ { dumped() }
		/^ *total_segment_size:/ { size = $2 }
		/pages = 1, objects free = [0-9]+\/72$/ { sub("/72", ""); spans += 72 - $NF }
		END { dumped() }')
}

expect "full, and nothing has failed" "$(rounds 1000 7872 0 1)" <<'SEEN'
7872 objects, 8.0 MB; freed and trimmed 1.0 MB, 0 spans
SEEN
expect "full, and failures: 1" "$(rounds 1000 1000000 1 1)" <<'SEEN'
7872 objects, 8.0 MB; freed and trimmed 3.0 MB, 1 spans
SEEN
expect "full, and failures: 100" "$(rounds 1000 1000000 100 1)" <<'SEEN'
7872 objects, 8.0 MB; freed and trimmed 5.0 MB, 100 spans
SEEN
expect "full, and failures: 1000" "$(rounds 1000 1000000 1000 1)" <<'SEEN'
7872 objects, 8.0 MB; freed and trimmed 5.0 MB, 1000 spans
SEEN
expect "full, and failures: 10000" "$(rounds 1000 1000000 10000 1)" <<'SEEN'
7872 objects, 8.0 MB; freed and trimmed 8.0 MB, 4917 spans
SEEN
expect "full six times, and 1000 failures each time" "$(rounds 1000 1000000 1000 6)" <<'SEEN'
7872 objects, 8.0 MB; freed and trimmed 5.0 MB, 1000 spans
7872 objects, 8.0 MB; freed and trimmed 7.0 MB, 2000 spans
7872 objects, 8.0 MB; freed and trimmed 8.0 MB, 3000 spans
7872 objects, 8.0 MB; freed and trimmed 8.0 MB, 4000 spans
7872 objects, 8.0 MB; freed and trimmed 8.0 MB, 4917 spans
7872 objects, 8.0 MB; freed and trimmed 8.0 MB, 4917 spans
SEEN
expect "large objects, and nothing has failed" "$(rounds 20000 406 0 1)" <<'SEEN'
406 objects, 8.0 MB; freed and trimmed 6.0 MB, 0 spans
SEEN
expect "large objects, and 1000 failures" "$(rounds 20000 1000000 1000 1)" <<'SEEN'
406 objects, 8.0 MB; freed and trimmed 6.0 MB, 0 spans
SEEN
stop "$version" data
finish
