# shellcheck shell=bash disable=SC2034,SC2154 # it shares variables with dev/bench
#
# What a key takes of dynamic shared memory, all included: the growth of all its
# segments by a million text keys of 16 bytes, but for the pages that wait for
# the next keys.  The server keeps the segments as files, which tell their sizes.
# Where it goes is told by the allocator's own account of itself.
#
# And what is left of it when most of many keys are gone.

# The sum of all segments, those of PostgreSQL's own statistics included.
segments_size() {
	find "$PGDATA/pg_dynshmem" -name 'mmap.*' -printf '%s\n' | awk '{ sum += $1 } END { print sum + 0 }'
}

# How far the variable that has the area of counters is from a function that is
# exported.  There are two places for it, and the first is used as long as nothing
# has moved.
distance_of_area() {
	nm "$("$PG_CONFIG" --pkglibdir)/statbuffer.so" | awk '
		function number(hex, i, n) {
			for (i = 1; i <= length(hex); i++)
				n = n * 16 + index("0123456789abcdef", substr(hex, i, 1)) - 1
			return n
		}
		$3 == "space_local" { area = number($1) }
		$3 == "statbuffer_launcher_main" { known = number($1) }
		END { if (area && known) print area - known }'
}

# What the allocator prints, as lines of: object size or "large", objects in
# use, bytes in use, bytes taken.  A large object has pages of its own.
allocator_account() {
	sql -c "SELECT sb_count('first', 'hits')" -c "SELECT dump_area($(distance_of_area))" >/dev/null
	sed -n '/^dsa_area handle/,$p' "$server_log" | awk '
		/^dsa_area handle/ { delete taken; delete used; free = 0 }
		/total_segment_size:/ { total = $2 }
		/contiguous_pages = / {
			pages = $0; sub(/.*contiguous_pages = /, "", pages); sub(/,.*/, "", pages)
			free += pages * 4096
		}
		/pool for blocks of span objects/ { class = "spans" }
		/pool for large object spans/ { class = "large" }
		/pool for size class/ { class = $0; sub(/.*object size /, "", class); sub(/ .*/, "", class) }
		/span descriptor at/ {
			pages = $0; sub(/.*pages = /, "", pages); sub(/,.*/, "", pages)
			objects = $0; sub(/.*objects free = /, "", objects); split(objects, n, "/")
			taken[class] += pages * 4096
			used[class] += class == "large" ? 1 : n[2] - n[1]
		}
		END {
			for (class in taken)
				print class, used[class], class ~ /^[0-9]/ ? used[class] * class : taken[class], taken[class]
			print "free", 1, free, free
			print "total", 1, total - free, total
		}'
}

# of_class FILE CLASS FIELD
of_class() {
	awk -v class="$2" -v field="$3" '$1 == class { sum += $field } END { print sum + 0 }' "$1"
}

memory_part() {
	record "$1" statbuffer "$million" 'bytes/key' "$(awk -v bytes="$2" -v keys="$million" 'BEGIN { print bytes / keys }')"
}

# What is left of ten million keys when all but 1,001 of them, one in ten thousand,
# are gone, and how long it takes until it is no more than it should be, and until
# it gets no less.
memory_after() {
	local keys=$((10 * million)) every=$((million / 100)) piece size last held bound began gone met=
	bench_server memory-after "dynamic_shared_memory_type = mmap" "max_worker_processes = 4"
	perform "CREATE FUNCTION forget(keys text[], counts bigint[]) RETURNS void LANGUAGE sql AS ''"
	perform "CREATE FOREIGN TABLE many (key text NOT NULL, count bigint NOT NULL)
		SERVER statbuffer OPTIONS (handler 'forget', interval '1h', timeout '10s', batch_size '100000')"
	for ((piece = 0; piece < 10; piece++)); do
		perform "INSERT INTO many SELECT 'key ' || to_char(n, 'FM000000000000'), 1 FROM generate_series($((piece * million)), $(((piece + 1) * million - 1))) AS n"
	done
	record before statbuffer "$keys" MB "$(segments_size | awk '{ print $1 / 1e6 }')"
	drain many
	perform "INSERT INTO many SELECT 'key ' || to_char(n * $every, 'FM000000000000'), 1 FROM generate_series(0, 1000) AS n"
	gone="SELECT keys = 1001 FROM sb_stat_buffers WHERE buffer = 'many'"
	while [ "$(ask "$gone")" != t ]; do sleep 0.1; done
	began=$(date +%s%N)
	held=$(ask "SELECT memory FROM sb_stat_memory")
	bound=$((2 * held + 16 * 1024 * 1024))
	last=$(segments_size)
	record sparse statbuffer "$keys" MB "$(awk -v bytes="$last" 'BEGIN { print bytes / 1e6 }')"
	for ((piece = 0; piece < 600; piece++)); do
		size=$(segments_size)
		if [ -z "$met" ] && ((size <= bound)); then
			met=$(date +%s%N)
			record until-met statbuffer "$keys" s "$(awk -v ns=$((met - began)) 'BEGIN { print ns / 1e9 }')"
		fi
		[ -z "$met" ] || ((size < last)) || break
		last=$size
		sleep 0.2
	done
	must_be "the keys held" 1001 "SELECT keys FROM sb_stat_buffers WHERE buffer = 'many'"
	record after statbuffer "$keys" MB "$(awk -v bytes="$size" 'BEGIN { print bytes / 1e6 }')"
	record after bound "$keys" MB "$(awk -v bytes="$bound" 'BEGIN { print bytes / 1e6 }')"
	must_have_counted many $((keys + 1001))
	stop_server
}

# Memory is the same in each round; one is enough.
measure_memory() {
	local before after account=$work/account counter piece free

	bench_server memory "dynamic_shared_memory_type = mmap" "max_worker_processes = 4"
	perform "ALTER FOREIGN TABLE hits OPTIONS (SET interval '1h')"
	perform "SELECT sb_increment('first', 1, 'hits')"
	load probe.sql probe="'$work/probe'"
	before=$(segments_size)
	before=$((before - $(allocator_account | awk '$1 == "free" { print $3 }')))
	# in pieces, as keys come one after the other and not at once
	for ((piece = 0; piece < 10; piece++)); do
		perform "INSERT INTO hits SELECT 'key ' || to_char(n, 'FM000000000000'), 1 FROM generate_series($((piece * million / 10 + 1)), $(((piece + 1) * million / 10))) AS n"
	done
	must_be "the keys held" $((million + 1)) "SELECT keys FROM sb_stat_buffers WHERE buffer = 'hits'"
	after=$(segments_size)
	memory_part accounted "$(ask "SELECT memory FROM sb_stat_buffers WHERE buffer = 'hits'")"

	allocator_account >"$account"
	free=$(of_class "$account" free 3)
	memory_part all $((after - free - before))
	memory_part waiting "$free"
	# what there is a million of, and the chunks of buckets, of 64 or 512 each
	counter=$(awk -v n="$million" '$1 ~ /^[0-9]/ && $2 >= n { print $1; exit }' "$account")
	memory_part counters "$(of_class "$account" "$counter" 3)"
	memory_part buckets $(($(of_class "$account" 512 3) + $(of_class "$account" 4096 3)))
	memory_part allocator "$(awk -v counter="$counter" '
		$1 == "total" { total = $3 } $1 == counter || $1 == 512 || $1 == 4096 { used += $3 }
		END { print total - used }' "$account")"
	must_have_counted hits $((million + 1))
	# or they were flushed now
	perform "TRUNCATE hits"
	stop_server
	memory_after
}
