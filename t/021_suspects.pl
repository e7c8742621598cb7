# A key that fails and is counted all the time is found among many others, by
# a handler that takes arrays and does not tell which key it was.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $db = 'postgres';
my $node = new_node('main');

sql(q{
	CREATE TABLE stored (key text PRIMARY KEY, n bigint NOT NULL);
	CREATE TABLE stop (yes boolean);
	CREATE FUNCTION store(keys text[], counts bigint[]) RETURNS void
	LANGUAGE plpgsql AS $$
	BEGIN
		IF 'bad' = ANY (keys) THEN
			RAISE 'something is wrong with one of these';
		END IF;
		INSERT INTO stored SELECT * FROM unnest(keys, counts)
		ON CONFLICT (key) DO UPDATE SET n = stored.n + EXCLUDED.n;
	END $$;
	CREATE FOREIGN TABLE hits (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'store', interval '20ms', batch_size '50', backoff '1h');

	-- counts the bad key in each of its transactions, and others in turn
	CREATE PROCEDURE traffic() LANGUAGE plpgsql AS $$
	BEGIN
		FOR i IN 1 .. 1000000 LOOP
			INSERT INTO hits VALUES ('bad'), ('k' || i % 1000), ('k' || (i + 500) % 1000);
			COMMIT;
			EXIT WHEN EXISTS (SELECT FROM stop);
			PERFORM pg_sleep(0.0005);
		END LOOP;
	END $$;
});

# The traffic goes on until the key is known to be to blame.
my $traffic = start_session($node, $db, 'CALL traffic()');
wait_for($node, $db,
	"SELECT failures > 0 AND last_error = 'something is wrong with one of these' FROM sb_keys('hits') WHERE key = 'bad'",
	'the failing key is told while it is counted');
is(sql("SELECT count(*) FROM sb_keys('hits') WHERE failures > 0"), '1', 'no other key is blamed');
sql('INSERT INTO stop VALUES (true)');
is(finish_session($traffic, 'the traffic ended'), '', 'and nothing went wrong there');

# Everything else is stored, and nothing of it twice.
wait_for($node, $db, "SELECT NOT EXISTS (SELECT FROM hits WHERE key <> 'bad')", 'all other keys are stored');
is(sql("SELECT sum(n) = 2 * sb_count('bad', 'hits') FROM stored"), 't', 'as often as they were counted');

$node->stop;
done_testing();
