# Keys of row types that are saved when the server stops, and loaded by the
# next: before and after the type is altered.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $db = 'postgres';
my $node = new_node('rows', q{shared_preload_libraries = 'statbuffer'});

sub held
{
	return sql(q{SELECT string_agg(key || '=' || n, ' ' ORDER BY key, n) FROM places});
}

# Stops with counts held, so that they are saved, and starts again.
sub restart
{
	my ($what) = @_;
	my $before = held();

	$node->stop('fast');
	ok(-f $node->data_dir . '/statbuffer.saved', "$what: saved");
	$node->start;
	is(held(), $before, "$what: loaded");
	return;
}

sql(q{
	CREATE TYPE place AS (city text, zip text);
	CREATE TYPE way AS (a place, b place[]);
	CREATE TABLE stored (key text, counter bigint);
	CREATE FUNCTION store(key way, counter bigint) RETURNS void LANGUAGE sql AS
	$$ INSERT INTO stored VALUES (key::text, counter) $$;
	CREATE FOREIGN TABLE places (key way, n bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'store', interval '1h', shutdown '0');
	INSERT INTO places VALUES (ROW(ROW('Bern', '3000'), ARRAY[ROW('Roma', '00118')::place]), 1),
		(ROW(ROW('Wien', '1010'), NULL), 2)});
restart('as it was');
sql(q{ALTER TYPE place ADD ATTRIBUTE country text});
is(held(), q{("(Bern,3000,)","{""(Roma,00118,)""}")=1 ("(Wien,1010,)",)=2}, 'a field is added');
restart('a field is added');
sql(q{INSERT INTO places VALUES (ROW(ROW('Bern', '3000', NULL), ARRAY[ROW('Roma', '00118', NULL)::place]), 10)});
restart('and the same key is counted anew');
sql(q{ALTER TYPE place DROP ATTRIBUTE zip});
sql(q{ALTER TYPE place ADD ATTRIBUTE zip text});
is(held(), q{("(Bern,,)","{""(Roma,,)""}")=1 ("(Bern,,)","{""(Roma,,)""}")=10 ("(Wien,,)",)=2}, 'a field is dropped and added');
restart('a field is dropped and added');
sql(q{INSERT INTO places VALUES (ROW(ROW('Wien', NULL, NULL), NULL), 20)});
is(sql(qq{SELECT sb_drain('places', '$patience')}), 't', 'all is drained');
is(sql(q{SELECT string_agg(key || '=' || counter, ' ' ORDER BY key) FROM stored}),
	q{("(Bern,,)","{""(Roma,,)""}")=11 ("(Wien,,)",)=22}, 'each key is stored once, with all of its counts');

$node->stop;
done_testing();
