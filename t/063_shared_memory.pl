# Shared memory is given back: by buffers that come and go, by requests that are
# repeated, and to the system when buffers are dropped.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;
use Time::HiRes qw(usleep);
use WasteTest;

my $db = 'postgres';

# Little memory, so that what is not given back is missed.  How much is in use
# cannot be seen: it comes in segments, and one of them stays where anything is
# left in it, such as the list of all buffers, which moves when it grows.  But
# there is an end to it, and how many of the largest keys there is room for
# tells to 25 of them, a block of 64 kB, what is in use.
my $node = new_node('room', q{shared_preload_libraries = 'statbuffer'},
	'statbuffer.max_memory = 4MB',
	'statement_timeout = ' . 5 * $PostgreSQL::Test::Utils::timeout_default . 's',
	'dynamic_shared_memory_type = mmap');
sql(q{
	CREATE FUNCTION forget(key text, counter bigint) RETURNS void LANGUAGE sql AS '';
	CREATE FOREIGN TABLE sweeper (key text NOT NULL, n bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'forget', interval '0', timeout '0');

	-- A worker that starts frees what other buffers of its database have left.
	CREATE PROCEDURE wait_for_workers() LANGUAGE plpgsql AS $$
	BEGIN
		WHILE EXISTS (SELECT FROM pg_stat_activity WHERE backend_type = 'statbuffer worker' AND query NOT LIKE 'asked%') LOOP
			PERFORM pg_sleep(0.001);
		END LOOP;
		COMMIT;
	END $$;
	CREATE PROCEDURE sweep() LANGUAGE plpgsql AS $$
	BEGIN
		CALL wait_for_workers();
		LOOP
			BEGIN
				PERFORM sb_async_increment('k', 1, 'sweeper');
				EXIT;
			EXCEPTION WHEN out_of_memory THEN
				PERFORM pg_sleep(0.01);
			END;
		END LOOP;
		PERFORM sb_drain('sweeper');
		CALL wait_for_workers();
	END $$;
	CREATE PROCEDURE come_and_go(n int) LANGUAGE plpgsql AS $$
	BEGIN
		FOR i IN 1 .. n LOOP
			CREATE FOREIGN TABLE passing (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
			SERVER statbuffer OPTIONS (handler 'forget', interval '1h');
			PERFORM sb_increment('key ' || k, 1, 'passing') FROM generate_series(1, 3) k;
			COMMIT;
			DROP FOREIGN TABLE passing;
			COMMIT;
			IF i % 100 = 0 THEN
				CALL sweep();
			END IF;
		END LOOP;
	END $$;

	-- Nobody flushes these keys.
	CREATE PROCEDURE fill(INOUT n int) LANGUAGE plpgsql AS $$
	DECLARE
		wanted int := n;
	BEGIN
		CREATE FOREIGN TABLE full_of_keys (key text NOT NULL, n bigint NOT NULL DEFAULT 1)
		SERVER statbuffer OPTIONS (handler 'no_such', interval '1h', timeout '1h');
		COMMIT;
		n := 0;
		BEGIN
			WHILE n < wanted LOOP
				PERFORM sb_async_increment(rpad('key ' || n, 1996), 1, 'full_of_keys');
				n := n + 1;
			END LOOP;
		EXCEPTION WHEN out_of_memory THEN
			NULL;
		END;
	END $$;
	CREATE PROCEDURE measure_room(INOUT n int) LANGUAGE plpgsql AS $$
	BEGIN
		CALL fill(n);
		DROP FOREIGN TABLE full_of_keys;
		COMMIT;
		CALL sweep();
	END $$;
});
my $session = $node->background_psql($db, timeout => 5 * $PostgreSQL::Test::Utils::timeout_default);
my $pid = $session->query_safe('SELECT pg_backend_pid()');

# A hundred at first, so that what is allocated once is.
$session->query_safe('CALL come_and_go(100)');
my $room = sql('CALL measure_room(1000000)');
my $used = memory_used($node, $pid);
$session->query_safe('CALL come_and_go(4000)');
has_not_grown($used, memory_used($node, $pid), 'a session grows by no more than what the server remembers of a relation', 4000 * 300);
$session->quit;
my $room_left = sql('CALL measure_room(1000000)');
cmp_ok($room, '>', 1000, 'there is room for many keys');
cmp_ok($room_left, '>=', $room - 25, 'and as much when 4,000 buffers have come and gone');
note "room for $room keys, later for $room_left";

# --- requests that are repeated ----------------------------------------------

# Who asks for a key's flush again and again, while the handler is at work,
# takes no more memory than who asks once.
make_buffer($node, $db, 'asked', q{interval '20ms', timeout '1h'});
my $gate = close_gate($node, $db);
sql(q{SELECT sb_increment('k', 1, 'asked')});
wait_for($node, $db, q{SELECT in_flight = 1 FROM sb_stat_buffers WHERE buffer = 'asked'}, 'a handler waits');
sql(q{
	INSERT INTO asked SELECT 'key ' || i FROM generate_series(1, 100) i;
	CREATE PROCEDURE ask(n int) LANGUAGE plpgsql AS $$
	BEGIN
		FOR i IN 1 .. n LOOP
			PERFORM sb_flush('key ' || i % 200, 'asked'), sb_flush_all('asked');
		END LOOP;
	END $$;
	CALL ask(200);
});
$room = sql('CALL measure_room(1000000)');
sql('CALL ask(40000)');
$room_left = sql('CALL measure_room(1000000)');
cmp_ok($room_left, '>=', $room - 25, 'requests that are repeated take no shared memory');
note "room for $room keys, later for $room_left";
open_gate($gate);
wait_for_stored($node, $db, 'asked', 101, 'and are served');
sql(q{LOAD 'statbuffer'; DROP FOREIGN TABLE asked});
sql('CALL sweep()');

# --- memory that goes back to the system -------------------------------------

# When buffers are dropped, the memory goes back to the system; also when the
# last one is, although the launcher has seen all of it and has nothing to do.
# Keys first, so that the buffers are not in the segment that stays.
my @late = map { "late_$_" } 1 .. 40;

sub use_memory
{
	sql(q{CALL fill(900)});
	sql(qq{
		CREATE FOREIGN TABLE $_ (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
		SERVER statbuffer OPTIONS (handler 'forget', interval '1h');
		SELECT sb_increment('k', 1, '$_');
	}) foreach @late;
	return shared_memory($node);
}

# A session without the library would tell nobody that they are dropped.
sub drop_and_wait
{
	my ($buffers, $bound, $what) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	sql("LOAD 'statbuffer'; DROP FOREIGN TABLE " . join ', ', @$buffers);
	for (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
	{
		last if shared_memory($node) <= $bound;
		usleep(100_000);
	}
	cmp_ok(shared_memory($node), '<=', $bound, $what);
}

# What there is when no more is given back, and when what is left was moved.
sub memory_at_rest
{
	my ($size, $looks) = (0, 0);

	for (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
	{
		my $now = shared_memory($node);

		$looks = $now == $size ? $looks + 1 : 0;
		last if $looks == 40;
		$size = $now;
		usleep(100_000);
	}
	return $size;
}

my $full = use_memory();
drop_and_wait([ 'full_of_keys', @late ], $full - 1024 * 1024, 'memory is given back when buffers are dropped');
my $shared = memory_at_rest();
cmp_ok(use_memory(), '>', $shared, 'memory is used again');
drop_and_wait([ 'full_of_keys', @late, 'sweeper' ], $shared, 'and given back when all buffers are dropped');

has_not_crashed($node, 'no process has crashed');
$node->stop;
done_testing();
