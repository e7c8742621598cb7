# The server stops while sessions count.  After a clean stop everything that
# was committed is stored, exactly; after a crash nothing is stored twice, and
# counting goes on.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

# Each transaction writes to the ledger what it counts, so the ledger says
# what was committed.
my $count_script = q{
\set k random(1, 500)
\set n random(1, 9)
BEGIN;
SELECT sb_increment('hot', :n, 'hits');
SELECT sb_increment('key ' || :k, :n, 'hits');
SELECT sb_increment(:k, :n, 'visits');
INSERT INTO ledger VALUES ('hits', 'hot', :n), ('hits', 'key ' || :k, :n), ('visits', :k, :n);
COMMIT;
};

my $definitions = q{
CREATE TABLE ledger (buffer text, key text, n bigint);
CREATE TABLE stored (buffer text, key text, n bigint, PRIMARY KEY (buffer, key));

CREATE FUNCTION store_hits(keys text[], counts bigint[]) RETURNS void
LANGUAGE sql AS $$
	INSERT INTO stored AS s SELECT 'hits', k, n FROM unnest(keys, counts) AS u (k, n)
	ON CONFLICT (buffer, key) DO UPDATE SET n = s.n + EXCLUDED.n
$$;
CREATE FUNCTION store_visit(key int, count bigint) RETURNS void
LANGUAGE sql AS $$
	INSERT INTO stored AS s VALUES ('visits', key, count)
	ON CONFLICT (buffer, key) DO UPDATE SET n = s.n + EXCLUDED.n
$$;
CREATE FOREIGN TABLE hits (key text NOT NULL, n bigint NOT NULL)
SERVER statbuffer OPTIONS (handler 'store_hits', interval '200ms', jitter '100ms', shutdown '60s');
CREATE FOREIGN TABLE visits (key int NOT NULL, n bigint NOT NULL)
SERVER statbuffer OPTIONS (handler 'store_visit', interval '500ms', batch_size '50', shutdown '60s');
};

# Keys whose stored count is not what the ledger says, for a person to see.
my $differences = q{
SELECT buffer, key, l.n AS ledger, s.n AS stored
FROM (SELECT buffer, key, sum(n) AS n FROM ledger GROUP BY buffer, key) l
	FULL JOIN stored s USING (buffer, key)
WHERE coalesce(l.n, 0) %s coalesce(s.n, 0) ORDER BY 1, 2 LIMIT 10};

# What was counted and is not stored is held again, if it had to be saved; for
# a buffer whose worker was just starting, for example.
sub drain
{
	my ($node) = @_;

	return $node->safe_psql('postgres',
		"SELECT sb_drain('hits', '180s'), sb_drain('visits', '180s')");
}

# Waits until the ledger has so many more transactions.
sub wait_for_transactions
{
	my ($node, $wanted) = @_;
	my $rows = $node->safe_psql('postgres', 'SELECT count(*) FROM ledger');

	return $node->poll_query_until('postgres',
		"SELECT count(*) > $rows + 3 * $wanted FROM ledger");
}

foreach my $preloaded (0, 1)
{
	my $how = $preloaded ? 'preloaded' : 'not preloaded';
	my $node = new_node($preloaded ? 'preloaded' : 'plain',
		$preloaded ? q{shared_preload_libraries = 'statbuffer'} : '');
	my $load;

	$node->safe_psql('postgres', $definitions);

	# A fast shutdown cuts the sessions off in the middle of what they do.
	# Several times, as it matters in the middle of what.
	foreach my $round (1 .. 10)
	{
		$node->safe_psql('postgres', 'TRUNCATE ledger, stored');
		$load = start_load($node, $count_script, '-c', '4', '-T', '3600');
		ok(wait_for_transactions($node, 300),
			"$how, fast shutdown $round: sessions count");
		$node->stop('fast');
		$load->{run}->finish;
		$node->start;
		is(drain($node), 't|t', "$how, fast shutdown $round: drained");
		is($node->safe_psql('postgres', sprintf($differences, '<>')),
			'', "$how, fast shutdown $round: all that was committed is stored");
	}

	# A smart shutdown lets the sessions finish first.
	$node->safe_psql('postgres', 'TRUNCATE ledger, stored');
	$load = start_load($node, $count_script, '-c', '4', '-t', '1000');
	ok(wait_for_transactions($node, 300), "$how, smart shutdown: sessions count");
	$node->stop('smart');
	$load->{run}->finish;
	$node->start;
	is(drain($node), 't|t', "$how, smart shutdown: drained");
	is($node->safe_psql('postgres', sprintf($differences, '<>')),
		'', "$how, smart shutdown: all that was committed is stored");

	# One with nothing going on.
	$node->restart;
	is($node->safe_psql('postgres', sprintf($differences, '<>')),
		'', "$how: an idle server is restarted");
	is( $node->safe_psql(
			'postgres', "SELECT count(*) FROM hits UNION ALL SELECT count(*) FROM visits"
		),
		"0\n0",
		"$how: nothing is held after a restart");
	unlike(slurp_file($node->logfile),
		qr/ERROR:.*(?:statbuffer|buffer)|PANIC|was terminated by signal/,
		"$how: none of that was an error");

	# A crash may lose what was not yet stored, and stores nothing twice.
	$node->safe_psql('postgres', 'TRUNCATE ledger, stored');
	foreach my $round (1 .. 3)
	{
		$load = start_load($node, $count_script, '-c', '4', '-T', '3600');
		ok(wait_for_transactions($node, 300), "$how, crash $round: sessions count");
		$node->stop('immediate');
		$load->{run}->finish;
		$node->start;
		is($node->safe_psql('postgres', sprintf($differences, '<')),
			'', "$how, crash $round: nothing is stored that was not counted");
	}
	note(
		"$how: lost in 3 crashes: "
		  . $node->safe_psql(
			'postgres',
			"SELECT (SELECT sum(n) FROM ledger) - (SELECT sum(n) FROM stored)
			 || ' of ' || (SELECT sum(n) FROM ledger)"));

	# After it the server counts as ever.
	$node->safe_psql('postgres', 'TRUNCATE ledger, stored');
	$load = start_load($node, $count_script, '-c', '4', '-t', '100');
	ok($load->{run}->finish, "$how: after a crash sessions count again");
	is(drain($node), 't|t', "$how: and it is stored");
	is($node->safe_psql('postgres', sprintf($differences, '<>')),
		'', "$how: all of it");
	is($node->safe_psql('postgres', 'SELECT sum(n) > 0 FROM stored'),
		't', "$how: and there was something");
	$node->stop;
}

done_testing();
